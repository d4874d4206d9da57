"""How long a lease may last: as long as its actor gets on, and never for ever.

    given up as no_progress   its actor has generated no token for `deadlines.lease_timeout_s`
    given up by its deadline  `limit_s` after it was issued, whatever its actor says

A fixed time for all would leave out the prompts that need the longest reasoning, again and again
until they are dropped, and nobody would see the bias. So the first rule is about progress, which an
actor reports. The second bounds what a report can be worth, from what groups really took:

    limit = max(timeout, `GENEROSITY` * the time that `USUAL` of the last `REMEMBERED` groups took)

It is fixed when a lease is issued, for the actor gives up by itself then. While fewer than `ENOUGH`
groups have come in, the timeout takes the place of their time. It is not the longest time that
counts: a few actors that hold what they have for as long as they may would raise the limit for all.
"""

from collections import deque

REMEMBERED = 256
ENOUGH = 8
USUAL = 0.9
GENEROSITY = 8.0


class LeaseLimit:
    """Measures how long groups take, from the lease to the arrival."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        """Time without a token after which a lease is given up."""
        self._times: deque[float] = deque(maxlen=REMEMBERED)

    def arrived(self, seconds: float) -> None:
        """Note a group that came in so long after it was leased."""
        self._times.append(seconds)

    @property
    def limit_s(self) -> float:
        """Time after which a lease that is issued now is given up in any case."""
        if len(self._times) < ENOUGH:
            return GENEROSITY * self.timeout_s
        usual_s = sorted(self._times)[int(USUAL * (len(self._times) - 1))]
        return max(self.timeout_s, GENEROSITY * usual_s)

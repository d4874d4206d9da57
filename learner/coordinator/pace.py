"""How early prompts are leased: just in time where the trainer is slower than the actors.

A batch is needed when the trainer asks for it, and is leased ``lead`` before that:

    now      end of the step at hand           + 1 step            + 2 steps
     │            │ batch 0 is needed             │ batch 1            │ batch 2
     ├────────────┼───────────────────────────────┼────────────────────┤
     └───────────── lead ─────────────┘  reaches batch 0: its groups may be leased or buffered

Whatever is leased earlier only waits in the buffer and becomes stale there. Everything is measured,
and each estimate errs to the early side, because a trainer that waits costs more than staleness:

    lead = `HEADROOM` * the longest that groups leased together took, from the first lease until
           the last of them was stored
           + the longest that the trainer waited for a batch + a tick of intake
    step = the shortest step

of the last `REMEMBERED` each. Where groups without signal are refilled, a batch takes as many more
as the one of them that took most. Where actors are the slower side, what they take and what the
trainer waits are longer than steps, the lead reaches further than they ever get, and nothing is
held back.
The limit on staleness (`learner.pacing`) holds besides, and waiting costs no permission: from which
versions a batch may be sampled depends on its number, not on when it is leased.
"""

from collections import deque
from dataclasses import dataclass, field

HEADROOM = 1.5
REMEMBERED = 8
TICK_S = 0.1
"""Longest time that intake lets pass between two looks at what may be leased."""


def batches_within(
    lead_s: float, *, until_next_s: float, step_s: float, max_uses: int = 1
) -> int | None:
    """How many batches of groups are needed within ``lead_s``; None: no number is too large.

    The next one is needed in ``until_next_s``, and each other ``max_uses`` steps after the one
    before it; the next one may have been used already, but for one time.
    """
    beyond_s = lead_s - until_next_s
    if beyond_s < 0:
        return 0
    if step_s <= 0:
        return None
    return 1 + int(beyond_s / step_s + max_uses - 1) // max_uses


@dataclass(slots=True, eq=False)
class _Burst:
    """Prompts that were leased one after the other, as fast as actors had room for them."""

    began_at: float
    size: int = 0
    open: set[int] = field(default_factory=set)
    """Prompt indices whose group is still to come."""
    stored_at: float | None = None
    """When the last group of the others was."""


class Pace:
    """Measures actors and trainer; time is passed in, and the coordinator holds its lock."""

    def __init__(self, batch_groups: int, max_uses: int = 1) -> None:
        """A batch of ``batch_groups`` lasts for ``max_uses`` steps."""
        self._batch_groups = batch_groups
        self._max_uses = max_uses
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._waits: deque[float] = deque(maxlen=REMEMBERED)
        self._bursts: deque[float] = deque(maxlen=REMEMBERED)
        self._refills: deque[int] = deque(maxlen=REMEMBERED)
        self._wanted_at: float | None = None
        """When the trainer asked for the batch that it waits for; None while it trains."""
        self._taken_at: float | None = None
        self._current: _Burst | None = None
        self._open: dict[_Burst, None] = {}
        """Bursts of which something is out, the oldest first."""
        self._burst_of: dict[int, _Burst] = {}
        """By prompt index."""

    # --- the trainer ----------------------------------------------------------------------------

    def batch_wanted(self, now: float) -> None:
        """Note that the trainer has done a step, and asks for a batch."""
        self._wanted_at = now
        if self._taken_at is not None:
            self._steps.append(now - self._taken_at)

    def batch_taken(self, now: float, num_refilled: int = 0) -> None:
        """Note that it has one, for which ``num_refilled`` groups without signal were left out."""
        self._refills.append(num_refilled)
        # Nothing could be leased early enough for the first one.
        if self._wanted_at is not None and self._taken_at is not None:
            self._waits.append(now - self._wanted_at)
        self._wanted_at, self._taken_at = None, now

    # --- the actors -----------------------------------------------------------------------------

    def leased(self, prompt_index: int, now: float) -> None:
        """Note a lease; a prompt that is leased again is timed from its first lease."""
        if self._taken_at is None or prompt_index in self._burst_of:
            # What is leased before the first batch fills the buffer, and engines are cold then.
            return
        burst = self._current
        if burst is None:
            burst = self._current = _Burst(now)
            self._open[burst] = None
        burst.size += 1
        burst.open.add(prompt_index)
        self._burst_of[prompt_index] = burst
        if burst.size == self._batch_groups:
            self.burst_over()

    def burst_over(self) -> None:
        """Note that nothing more may be leased for now, although there are actors with room."""
        burst, self._current = self._current, None
        if burst is not None:
            self._settle(burst)

    def stored(self, prompt_index: int, now: float) -> None:
        """Note that a prompt's group is stored."""
        if burst := self._burst_of.get(prompt_index):
            burst.stored_at = now
        self.gave_up(prompt_index)

    def gave_up(self, prompt_index: int) -> None:
        """Note that a prompt is not leased any more."""
        if burst := self._burst_of.pop(prompt_index, None):
            burst.open.remove(prompt_index)
            self._settle(burst)

    def _settle(self, burst: _Burst) -> None:
        if burst.open or burst is self._current:
            return
        del self._open[burst]
        if burst.stored_at is not None:
            self._bursts.append(burst.stored_at - burst.began_at)

    # --- what follows ---------------------------------------------------------------------------

    def lead_s(self, now: float) -> float | None:
        """How long before it is needed a batch is leased; None while nothing is measured."""
        if not self._bursts or not self._steps:
            return None
        oldest = next(iter(self._open), None)
        running = now - oldest.began_at if oldest else 0.0
        longest = max(running, *self._bursts)
        return HEADROOM * longest + max(self._waits, default=0.0) + TICK_S

    def groups_wanted(self, now: float) -> int | None:
        """Groups, leased and buffered, that are not too early now; None: as many as there may be.

        The batch in training is not among them.
        """
        lead_s = self.lead_s(now)
        if lead_s is None or self._taken_at is None:
            return None
        step_s = min(self._steps)
        until_next_s = 0.0
        if self._wanted_at is None:
            until_next_s = max(0.0, self._taken_at + step_s - now)
        batches = batches_within(
            lead_s, until_next_s=until_next_s, step_s=step_s, max_uses=self._max_uses
        )
        of_one = self._batch_groups + max(self._refills, default=0)
        return None if batches is None else batches * of_one

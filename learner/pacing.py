"""How many leases may be out: one inequality, the capacity rule of AReaL (arXiv 2505.24298).

With V the trainer's version and a the version that an actor samples from, a group leased to it
now will be trained on after everything that is outstanding, buffered, or in the batch at hand (V
counts that batch only when its step is done). Its staleness then is at most V - a plus the number
of whole batches before it, so it stays within the limit exactly while

    outstanding + buffered + in training < (max_staleness + 1 - (V - a)) * batch_groups

and, as no more than the rest of the run can be used, while

    outstanding + buffered + in training < (steps - V) * batch_groups

With max_uses above 1 a batch of groups lasts for that many steps: both bounds are then divided by
it, the first rounded down to whole batches, the second up.

Only every push_every-th version is pushed, so that V - a reaches push_every - 1 before a push even
begins. A batch must fit into the first bound there as well, or training waits for a version that
only training can make:

    push_every <= max_staleness + 2 - max_uses

Above max_staleness + 1 no run gets past that point, as all that it has is too stale. In between,
where max_uses is above 1, a run goes on while it has a batch to use again, and stops when a batch
is used up at that point; a resume without a journal is enough to get there. A run of fewer steps
than push_every ends before.

A fixed lag (see `learner.replay.buffer`) takes the place of max_staleness in the first bound.

What is allowed is seldom needed: where the trainer is the slower side, `learner.coordinator.pace`
says how much of it is worth leasing already. A fixed lag does without.

Memory bounds work the same way: what is outstanding counts as if it had already arrived, at its
largest. The constructor refuses bounds under which a batch could never fill.
"""

from dataclasses import dataclass

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pacing:
    """The limits that decide whether another training lease may be issued."""

    max_staleness: int
    batch_groups: int
    steps: int
    max_groups: int
    max_bytes: int
    group_bytes: int
    """Largest size of one group."""
    max_uses: int = 1
    lag: int | None = None
    push_every: int = 1

    def __post_init__(self) -> None:
        held = min(1 + (self.lag or 0), self.steps) * self.batch_groups
        what = f"{held} groups" + (f" (for buffer.lag = {self.lag})" if self.lag else "")
        if self.lag is not None and self.lag > self.max_staleness:
            raise ConfigError(
                f"buffer.lag = {self.lag} is above training.max_staleness = {self.max_staleness}: "
                "raise that, or every batch would be too stale"
            )
        if self.lag is not None and self.max_uses > 1:
            raise ConfigError("buffer.lag needs buffer.max_uses = 1: a second use comes later")
        if self.max_groups < held:
            raise ConfigError(
                f"buffer.max_groups = {self.max_groups} can never hold {what}: training would "
                "wait for ever"
            )
        if self.max_uses > self.max_staleness + 1:
            raise ConfigError(
                f"buffer.max_uses = {self.max_uses} needs training.max_staleness of at least "
                f"{self.max_uses - 1}: every further use is one version later"
            )
        if self.lag is not None and self.push_every > 1:
            raise ConfigError(
                f"buffer.lag = {self.lag} needs weights.push_every = 1: every batch is sampled "
                "from a version of its own"
            )
        behind = min(self.push_every, self.steps) - 1
        if self.max_staleness + 1 - behind < self.max_uses:
            raise ConfigError(
                f"weights.push_every = {self.push_every} needs training.max_staleness of at least "
                f"{behind + self.max_uses - 1}: training would wait for ever for groups that are "
                f"not too stale, because actors are up to {behind} versions behind before a push"
                + (", and every further use is one version later" if self.max_uses > 1 else "")
            )
        if self.max_bytes < held * self.group_bytes:
            raise ConfigError(
                f"buffer.max_bytes = {self.max_bytes} may not hold {what}: they take up to "
                f"{held * self.group_bytes} bytes; raise it, or lower sampling.max_tokens or "
                "training.batch_groups"
            )

    def is_pushed(self, version: int) -> bool:
        """Whether actors get this version: by its number, so that a resumed run pushes the same."""
        return version % self.push_every == 0 or version == self.steps

    def allowed(
        self,
        *,
        trainer_version: int,
        actor_version: int,
        outstanding: int,
        buffered: int,
        in_training: int,
        buffered_bytes: int,
        wanted: int | None = None,
    ) -> int:
        """Training leases that an actor at ``actor_version`` may be given now; 0 or more.

        No more than ``wanted`` groups are to be outstanding and buffered, however many may be.
        """
        behind = trainer_version - actor_version
        reach = self.max_staleness if self.lag is None else self.lag
        by_staleness = (reach + 1 - behind) // self.max_uses * self.batch_groups
        steps_left = self.steps - trainer_version
        by_need = -(-steps_left // self.max_uses) * self.batch_groups
        ahead = outstanding + buffered + in_training
        by_groups = min(by_staleness - ahead, by_need - ahead, self.max_groups - ahead)
        by_bytes = (self.max_bytes - buffered_bytes) // self.group_bytes - outstanding
        by_pace = by_groups
        if wanted is not None and self.lag is None:
            by_pace = wanted - outstanding - buffered
        return max(0, min(by_groups, by_bytes, by_pace))


def largest_group_bytes(num_rollouts: int, prompt: int, completion: int, rewards: int) -> int:
    """Memory of a group whose prompt and completions all have their largest length."""
    return num_rollouts * completion * 8 + prompt * 4 + num_rollouts * rewards * 4

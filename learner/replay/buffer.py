"""The replay buffer: complete groups between intake and trainer.

    add ──► buffered ──► trained          used `max_uses` times, or fewer and then evicted
                    └──► evicted[cause]   never used: too stale or without signal when it would have
                                          been in a batch, or no room

    invariant:   accepted = trained + evicted + buffered

Raw scores are stored; advantages are computed when a batch is cut. Staleness is measured then
too, so time in the queue counts: trainer version minus the oldest version in the group. Whether a
group has any signal is asked then as well, of those only whose turn it is: it depends on what the
rewards count, which may change from one step to the next.

With a fixed ``lag`` of L a batch is cut only while the L batches after it are buffered as well, and
pacing leaves room for no more. So nothing is being generated when a batch is cut, the next one is
sampled from exactly the version that the step makes, and is trained on L versions later:

    lag 2:  version        0       1    2    3    4
            sampled     b0 b1 b2   b3   b4   b5   b6
            trained on     b0      b1   b2   b3   b4
            staleness      0       1    2    2    2
"""

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import Literal, NamedTuple, Self

from learner.config.run import RunConfig
from learner.state import GroupState
from protocol.groups import Group

LackSignal = Callable[[Sequence[Group]], Sequence[bool]]
"""Tells of each group whether there is nothing to learn from it."""
NO_SIGNAL = "no_signal"


@dataclass(slots=True)
class GroupCounts:
    """Counts of groups since the start of the run, of the learners before a resume too."""

    accepted: int = 0
    accepted_tokens: int = 0
    trained: int = 0
    evicted: Counter[str] = field(default_factory=Counter)
    """Counts by cause."""
    evicted_tokens: Counter[str] = field(default_factory=Counter)
    """Counts by cause: dropping by age is biased against long rollouts, which this shows."""
    buffered: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every accepted group is trained, evicted or buffered."""
        return self.accepted == self.trained + self.evicted.total() + self.buffered


@dataclass(slots=True, eq=False)
class _Entry:
    group: Group
    prompt_index: int
    uses: int = 0


class _Evicted(NamedTuple):
    """What is remembered of a group until the next batch is cut: not its tokens."""

    prompt_index: int
    cause: str
    num_tokens: int
    used: bool


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """A training batch, and what it took to get it: enough to cut the same one again."""

    groups: list[Group]
    prompt_indices: tuple[int, ...]
    """Places of the groups in the stream of prompts."""
    evicted: tuple[tuple[int, str], ...]
    """(prompt_index, cause) of the groups that were evicted since the batch before."""
    finished: tuple[int, ...]
    """Prompt indices of the groups, evicted ones included, that are not in the buffer any more."""

    @property
    def num_refilled(self) -> int:
        """Groups without signal whose place others took."""
        return sum(cause == NO_SIGNAL for _, cause in self.evicted)


class ReplayBuffer:
    """Bounded in groups and bytes; one thread adds, one takes."""

    def __init__(
        self,
        *,
        max_groups: int,
        max_bytes: int,
        max_staleness: int,
        max_uses: int = 1,
        sampling: Literal["fifo", "freshest"] = "fifo",
        lag: int = 0,
    ) -> None:
        """A ``lag`` above 0 makes an experiment on staleness; `learner.pacing` has its limits."""
        if min(max_groups, max_bytes, max_uses) < 1 or max_staleness < 0:
            raise ValueError("max_groups, max_bytes, max_uses must be positive, max_staleness >= 0")
        self._max_groups = max_groups
        self._max_bytes = max_bytes
        self._max_staleness = max_staleness
        self._max_uses = max_uses
        self._sampling = sampling
        self._lag = lag
        self._entries: list[_Entry] = []
        self._evicted: list[_Evicted] = []
        """What was evicted since the last batch was cut."""
        self._changed = Condition()
        self._woken = False
        self.in_training = 0
        """Groups that the last `take` removed, until `step_done`."""
        self.size_bytes = 0
        self.largest_staleness = 0
        """The largest of any group that `take` returned."""
        self.counts = GroupCounts()

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Build the buffer that a configuration describes."""
        return cls(
            max_groups=config.buffer.max_groups,
            max_bytes=config.buffer.max_bytes,
            max_staleness=config.training.max_staleness,
            max_uses=config.buffer.max_uses,
            sampling=config.buffer.sampling,
            lag=config.buffer.lag or 0,
        )

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def unused_prompt_indices(self) -> tuple[int, ...]:
        """Prompt indices of the groups that are buffered and were not trained on yet."""
        with self._changed:
            return tuple(entry.prompt_index for entry in self._entries if not entry.uses)

    def state(self) -> GroupState:
        """Return the counts as they were when the last batch was cut."""
        with self._changed:
            counts = self.counts
            evicted, tokens = Counter(counts.evicted), Counter(counts.evicted_tokens)
            for gone in self._evicted:
                if not gone.used:
                    evicted[gone.cause] -= 1
                    tokens[gone.cause] -= gone.num_tokens
            buffered = [entry.group.num_tokens for entry in self._entries if not entry.uses]
            reusable = [entry.group.num_tokens for entry in self._entries if entry.uses]
            pending = sum(gone.num_tokens for gone in self._evicted)
            return GroupState(
                trained=counts.trained - sum(gone.used for gone in self._evicted),
                ended_tokens=counts.accepted_tokens - sum(buffered) - sum(reusable) - pending,
                buffered=len(buffered),
                buffered_tokens=sum(buffered),
                reusable=len(reusable),
                reusable_tokens=sum(reusable),
                evicted=dict(+evicted),
                evicted_tokens=dict(+tokens),
                largest_staleness=self.largest_staleness,
            )

    def restore(self, state: GroupState) -> None:
        """Empty the buffer, and carry on the counts of ``state``."""
        self.largest_staleness = state.largest_staleness
        self.counts = GroupCounts(
            accepted=state.trained + sum(state.evicted.values()),
            accepted_tokens=state.ended_tokens,
            trained=state.trained,
            evicted=Counter(state.evicted),
            evicted_tokens=Counter(state.evicted_tokens),
        )

    def lose(self, state: GroupState) -> None:
        """Count what was buffered in ``state`` as lost."""
        self.counts.accepted += state.buffered + state.reusable
        self.counts.accepted_tokens += state.buffered_tokens + state.reusable_tokens
        self.counts.trained += state.reusable
        if state.buffered:
            self.counts.evicted["learner_lost"] += state.buffered
            self.counts.evicted_tokens["learner_lost"] += state.buffered_tokens

    def put_back(self, group: Group, prompt_index: int, uses: int) -> None:
        """Store a group that was in the buffer before, whatever the bounds are now.

        The batches that follow are those that were cut then.
        """
        with self._changed:
            self._accept(_Entry(group, prompt_index, uses))

    def add(self, group: Group, prompt_index: int) -> None:
        """Store a group; when full, the oldest makes room. Leases are paced so that it never is."""
        with self._changed:
            self._accept(_Entry(group, prompt_index))
            while len(self._entries) > self._max_groups or self.size_bytes > self._max_bytes:
                self._evict(self._entries[0], "overflow")
            self._changed.notify_all()

    def take(
        self,
        num_groups: int,
        version: int,
        timeout_s: float,
        *,
        batches_after: int = 0,
        lack_signal: LackSignal | None = None,
    ) -> TrainingBatch | None:
        """Cut a batch of ``num_groups`` for the trainer at ``version``.

        None after ``timeout_s``, after `wake`, or when evictions made room for other groups.
        ``batches_after`` is the number of batches that are still to come in the run: at its end
        fewer than the lag can be held back.

        Groups that are too stale by now are evicted first, and of those that would be in the batch
        the ones that ``lack_signal``. ``fifo`` takes groups in the order of the data, so that a
        slow one is not overtaken while it can still be used; ``freshest`` takes those whose oldest
        token is youngest.
        """
        needed = num_groups * (1 + min(self._lag, batches_after))
        known: dict[_Entry, bool] = {}

        def is_complete() -> bool:
            self._evict_stale(version)
            if lack_signal is not None:
                self._evict_silent(num_groups, lack_signal, known)
            return len(self._entries) >= needed

        with self._changed:
            self._woken, before = False, len(self._evicted)
            self._changed.wait_for(
                lambda: self._woken or is_complete() or len(self._evicted) > before, timeout_s
            )
            return self._cut(self._choose(num_groups), version) if is_complete() else None

    def retake(
        self, prompt_indices: Sequence[int], evicted: Iterable[tuple[int, str]], version: int
    ) -> TrainingBatch:
        """Cut a batch again as it was cut before, at the same version.

        Raises KeyError with the prompt index of a group that is missing.
        """
        with self._changed:
            entries = {entry.prompt_index: entry for entry in self._entries}
            for prompt_index, cause in evicted:
                self._evict(entries[prompt_index], cause)
            return self._cut([entries[prompt_index] for prompt_index in prompt_indices], version)

    def step_done(self) -> None:
        """Note that the trainer has finished with what it took."""
        self.in_training = 0

    def wake(self) -> None:
        """End a waiting `take`, because the run cannot continue."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def _cut(self, chosen: Sequence[_Entry], version: int) -> TrainingBatch:
        for entry in chosen:
            entry.uses += 1
            staleness = version - entry.group.oldest_version
            self.largest_staleness = max(self.largest_staleness, staleness)
            if entry.uses == self._max_uses:
                # First: a count of groups without the lock may find one twice, but misses none.
                self.in_training += 1
                self._remove(entry)
                self.counts.trained += 1
        evicted, self._evicted = tuple((e.prompt_index, e.cause) for e in self._evicted), []
        used_up = [entry.prompt_index for entry in chosen if entry.uses == self._max_uses]
        return TrainingBatch(
            groups=[entry.group for entry in chosen],
            prompt_indices=tuple(entry.prompt_index for entry in chosen),
            evicted=evicted,
            finished=(*used_up, *(prompt_index for prompt_index, _ in evicted)),
        )

    def _choose(self, num_groups: int) -> Sequence[_Entry]:
        if self._sampling == "freshest":
            by_age = sorted(self._entries, key=lambda e: e.group.oldest_version, reverse=True)
            return by_age[:num_groups]
        return self._entries[:num_groups]

    @property
    def num_refilled(self) -> int:
        """Groups without signal that were evicted since the last batch was cut."""
        with self._changed:
            return sum(gone.cause == NO_SIGNAL for gone in self._evicted)

    def _evict_stale(self, version: int) -> None:
        """Evict what is too stale."""
        oldest_allowed = version - self._max_staleness
        for entry in [e for e in self._entries if e.group.oldest_version < oldest_allowed]:
            self._evict(entry, "stale")

    def _evict_silent(
        self, num_groups: int, lack_signal: LackSignal, known: dict[_Entry, bool]
    ) -> None:
        """Evict from the next ``num_groups`` until all of them have a signal, as far as ``known``.

        What is found out about the others is added there.
        """
        while chosen := self._choose(num_groups):
            if new := [entry for entry in chosen if entry not in known]:
                known |= zip(new, lack_signal([entry.group for entry in new]), strict=True)
            silent = [entry for entry in chosen if known[entry]]
            if not silent:
                return
            for entry in silent:
                self._evict(entry, NO_SIGNAL)

    def _accept(self, entry: _Entry) -> None:
        self.counts.accepted += 1
        self.counts.accepted_tokens += entry.group.num_tokens
        bisect.insort(self._entries, entry, key=lambda e: e.prompt_index)
        self.size_bytes += entry.group.size_bytes
        self.counts.buffered += 1

    def _remove(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self.size_bytes -= entry.group.size_bytes
        self.counts.buffered -= 1

    def _evict(self, entry: _Entry, cause: str) -> None:
        self._remove(entry)
        self._evicted.append(
            _Evicted(entry.prompt_index, cause, entry.group.num_tokens, bool(entry.uses))
        )
        if entry.uses:
            # It was trained on, if fewer times than allowed.
            self.counts.trained += 1
        else:
            self.counts.evicted[cause] += 1
            self.counts.evicted_tokens[cause] += entry.group.num_tokens

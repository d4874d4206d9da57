"""Keeps completions to be read, on a thread of its own: training never waits for it.

    add(step) ──► draws a sample, remembers the batch ──► decode ──► files
    (training)                                           (completions)

What is kept is for people. So nothing that fails here ends a run: it is said once, and no more is
kept. Memory is bounded too, for the batch remembered is always the newest one, and samples that the
thread cannot keep up with are dropped.

Shapes: P groups of a batch, G rollouts of each.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.completions.files import Completion, CompletionFiles
from learner.threads import Worker
from protocol.errors import brief
from protocol.groups import Group

log = logging.getLogger("learner")

SAMPLE_EVERY_S = 2.0
"""Seconds from one addition to the files to the next, where steps are that quick."""
NEWEST_EVERY_S = 10.0
"""Seconds from one batch that is kept whole to the next, likewise."""
CLOSE_TIMEOUT_S = 60.0
"""Longest wait at the end of a run for what is not written yet."""
MAX_WAITING = 64
"""Samples that may wait for the thread."""


class _Drawn(NamedTuple):
    """One completion of a sample, before it is decoded."""

    step: int
    prompt_index: int
    rollout: int
    group: Group
    advantage: float


class TrainedOn(NamedTuple):
    """A batch, as a step was trained on it."""

    step: int
    groups: Sequence[Group]
    prompt_indices: Sequence[int]
    advantages_PG: npt.NDArray[np.floating[Any]]

    def drawn(self, places: Iterable[int]) -> Iterator[_Drawn]:
        """The completions at these of its P * G places."""
        for place in places:
            p, g = divmod(place, self.advantages_PG.shape[1])
            yield _Drawn(
                self.step,
                self.prompt_indices[p],
                g,
                self.groups[p],
                float(self.advantages_PG[p, g]),
            )


@dataclass(slots=True)
class _Work:
    """What goes into the files next."""

    sample: list[_Drawn] = field(default_factory=list)
    newest: TrainedOn | None = None


class CompletionKeeper:
    """Takes batches from the thread that trains; keeps what `CompletionFiles` has room for."""

    def __init__(
        self,
        files: CompletionFiles,
        *,
        per_step: int,
        seed: int,
        load_tokenizer: Callable[[], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``load_tokenizer`` is called once, on the thread."""
        self._files = files
        self._per_step = per_step
        self._seed = seed
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Any = None
        self._clock = clock
        self._sample: deque[list[_Drawn]] = deque(maxlen=MAX_WAITING)
        self._num_dropped = 0
        self._newest: TrainedOn | None = None
        self._sample_due = self._newest_due = clock()
        self._worker = Worker("completions", self._take, self._handle, drains=True)
        self._stopped = not per_step

    def resume(self, step: int) -> None:
        """Forget what is trained again after ``step``; to be called before the first `add`."""
        try:
            for text in self._files.forget_after(step):
                log.warning("deleted: %s", text)
        except OSError as error:
            self._stop(error)

    def start(self) -> None:
        """Begin to write."""
        # What fails is said by `_handle`, which ends nothing.
        self._worker.start(lambda _: None)

    def add(self, batch: TrainedOn) -> None:
        """Keep a sample of a step, and all of it until the next; never waits."""
        if self._stopped:
            return
        size = batch.advantages_PG.size
        # The same ones if the step is made again.
        drawing = random.Random(f"{self._seed}/{batch.step}")
        places = sorted(drawing.sample(range(size), min(self._per_step, size)))
        sample = list(batch.drawn(places))
        with self._worker.adding():
            self._num_dropped += len(self._sample) == MAX_WAITING
            self._sample.append(sample)
            self._newest = batch

    def write_soon(self) -> None:
        """Write the samples that wait now: a run that is resumed here will not make them again."""
        with self._worker.adding():
            self._sample_due = self._clock()

    def close(self) -> None:
        """Write what waits, for which a run waits no longer than `CLOSE_TIMEOUT_S`."""
        self._worker.close(CLOSE_TIMEOUT_S)

    def _take(self) -> _Work | None:
        now, closing = self._clock(), self._worker.closing
        work = _Work()
        if self._sample and (closing or now >= self._sample_due):
            work.sample = [drawn for sample in self._sample for drawn in sample]
            self._sample.clear()
            self._sample_due = now + SAMPLE_EVERY_S
        if self._newest is not None and (closing or now >= self._newest_due):
            work.newest, self._newest = self._newest, None
            self._newest_due = now + NEWEST_EVERY_S
        if self._num_dropped and work.sample:
            log.warning("no completions are kept of %d steps: too many waited", self._num_dropped)
            self._num_dropped = 0
        return work if work.sample or work.newest is not None else None

    def _handle(self, work: _Work) -> None:
        if self._stopped:
            return
        try:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            if work.sample:
                self._files.add(self._read(work.sample))
            if (newest := work.newest) is not None:
                drawn = list(newest.drawn(range(newest.advantages_PG.size)))
                self._files.replace_newest(self._read(drawn))
        except Exception as error:  # A tokenizer may raise anything.
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._stopped = True
        log.warning("completions are not kept any more: %s", brief(error))

    def _read(self, sample: Sequence[_Drawn]) -> list[Completion]:
        """Decode: prompts as the model saw them, completions as the reward functions did."""
        texts = self._tokenizer.batch_decode(
            [drawn.group.rollouts[drawn.rollout].tokens for drawn in sample],
            skip_special_tokens=True,
        )
        groups = {id(drawn.group): drawn.group for drawn in sample}
        prompts = self._tokenizer.batch_decode([g.prompt_tokens for g in groups.values()])
        prompt_of = dict(zip(groups, prompts, strict=True))
        return [
            _completion(drawn, prompt_of[id(drawn.group)], text)
            for drawn, text in zip(sample, texts, strict=True)
        ]


def _completion(drawn: _Drawn, prompt: str, text: str) -> Completion:
    group, rollout = drawn.group, drawn.group.rollouts[drawn.rollout]
    versions = [version for _, version in rollout.spans]
    scores = group.scores[drawn.rollout].tolist()
    return Completion(
        step=drawn.step,
        prompt_index=drawn.prompt_index,
        rollout=drawn.rollout,
        prompt=prompt,
        completion=text,
        tokens=len(rollout.tokens),
        finish=rollout.finish,
        oldest_version=min(versions),
        newest_version=max(versions),
        advantage=drawn.advantage,
        scores=dict(zip(group.reward_names, scores, strict=True)),
    )

"""One evaluation: held-out prompts rolled out by the actors under one version of the weights."""

from collections import deque
from threading import Event

import numpy as np

from protocol.groups import Floats, Group
from protocol.leases import Work


class Evaluation:
    """Collects the scores of its prompts; `done` is set when every prompt has one end."""

    def __init__(self, works: list[Work], version: int) -> None:
        """``works`` are to be sampled from ``version`` of the weights."""
        self.version = version
        self.waiting = deque(works)
        self.done = Event()
        self.num_failed = 0
        self._open = {work.prompt_id for work in works}
        self._scores: dict[str, Floats] = {}
        self._num_tokens = 0
        self._num_rollouts = 0
        if not works:
            self.done.set()

    def wants(self, work: Work) -> bool:
        """Whether ``work`` belongs to this evaluation and has not ended."""
        return work.prompt_id in self._open

    def receive(self, work: Work, group: Group) -> None:
        """Take the scores of one prompt's group."""
        self._scores[work.prompt_id] = group.scores
        self._num_tokens += group.num_tokens
        self._num_rollouts += len(group.rollouts)
        self._end(work)

    def give_up(self, work: Work) -> None:
        """Leave a prompt out that failed too often."""
        self.num_failed += 1
        self._end(work)

    @property
    def num_prompts(self) -> int:
        """The number of prompts whose groups came in."""
        return len(self._scores)

    def means(self, names: tuple[str, ...]) -> dict[str, float | None]:
        """Mean of each reward over all rollouts to which it applies; None if to none."""
        if not self._scores:
            return dict.fromkeys(names)
        scores_NK = np.concatenate(list(self._scores.values())).astype(np.float64)
        return {
            name: float(np.nanmean(column)) if np.isfinite(column).any() else None
            for name, column in zip(names, scores_NK.T, strict=True)
        }

    @property
    def mean_tokens(self) -> float:
        """Mean length of the completions."""
        return self._num_tokens / max(self._num_rollouts, 1)

    def _end(self, work: Work) -> None:
        self._open.remove(work.prompt_id)
        if not self._open:
            self.done.set()

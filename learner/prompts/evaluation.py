"""One evaluation: sets of held-out prompts rolled out by actors under one version of the weights.

due ──► begin(version) ──► groups of all prompts ──► done
              ▲  │
              └──┘ no actor is left that has the version: all of it anew, with another one
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Event

import numpy as np

from learner.config.data import PassWhen
from learner.prompts.pass_at_k import pass_at_k
from protocol.groups import Floats, Group
from protocol.leases import Work


@dataclass(slots=True)
class SetScores:
    """What came in of one set of prompts."""

    num_prompts: int
    num_failed: int = 0
    """Prompts that are left out because they failed too often."""
    scores: dict[str, Floats] = field(default_factory=dict)
    """[G, K] by prompt."""
    num_tokens: int = 0
    num_rollouts: int = 0
    num_truncated: int = 0
    """Rollouts that were cut off."""

    def add(self, prompt_id: str, group: Group) -> None:
        """Take one prompt's group."""
        self.scores[prompt_id] = group.scores
        self.num_tokens += group.num_tokens
        self.num_rollouts += len(group.rollouts)
        self.num_truncated += sum(rollout.finish == "length" for rollout in group.rollouts)

    def means(self, names: Sequence[str]) -> dict[str, float | None]:
        """Mean of each reward over all rollouts to which it applies; None if to none."""
        if not self.scores:
            return dict.fromkeys(names)
        scores_NK = np.concatenate(list(self.scores.values())).astype(np.float64)
        return {
            name: float(np.nanmean(column)) if np.isfinite(column).any() else None
            for name, column in zip(names, scores_NK.T, strict=True)
        }

    def passes(self, ks: Sequence[int], when: PassWhen, names: Sequence[str]) -> dict[int, float]:
        """Mean pass@k over the prompts with k rollouts to which the reward applies, by k.

        A k for which there is no such prompt is left out.
        """
        column = list(names).index(when.reward)
        counts = []
        for scores_GK in self.scores.values():
            scores_G = scores_GK[:, column]
            # NaN: the reward does not apply, and nobody can say whether it passes.
            applies_G = np.isfinite(scores_G)
            counts.append((int(applies_G.sum()), int((scores_G[applies_G] >= when.at_least).sum())))
        passes = {k: [pass_at_k(n, c, k) for n, c in counts if n >= k] for k in ks}
        return {k: sum(chances) / len(chances) for k, chances in passes.items() if chances}


class Evaluation:
    """Collects the scores of its prompts, until every prompt has one end."""

    def __init__(self, works: Mapping[str, Sequence[Work]], due: int) -> None:
        """``works`` of each set by its name, to be sampled from one version, of ``due`` or later.

        They are handed out after `begin`.
        """
        self.due = due
        """The training step after which it was to begin."""
        self.version: int | None = None
        """Version that is evaluated; None before `begin`, and while nobody has it."""
        self.waiting: deque[Work] = deque()
        """Prompts to be leased."""
        self.done = Event()
        """Set by `finish`."""
        self.sets: dict[str, SetScores] = {}
        self.began_at = 0.0
        """When `begin` was called last; by the caller's clock."""
        self.seconds = 0.0
        """How long it took from then on, once it is done."""
        self._works = works
        self._times_begun = 0
        self._open: dict[str, str] = {}
        """Set by prompt, of the prompts that have no end yet."""
        self._clear()

    def begin(self, version: int, now: float) -> None:
        """Evaluate ``version`` from now on."""
        self.version, self.began_at = version, now

    def start_over(self) -> None:
        """Forget what came in: nobody has the version any more of which it is."""
        self.version = None
        self._clear()

    def wants(self, work: Work) -> bool:
        """Whether ``work`` belongs to this evaluation and has not ended."""
        return work.prompt_id in self._open

    def receive(self, work: Work, group: Group) -> None:
        """Take one prompt's group."""
        self.sets[self._open.pop(work.prompt_id)].add(work.prompt_id, group)

    def give_up(self, work: Work) -> None:
        """Leave a prompt out that failed too often."""
        self.sets[self._open.pop(work.prompt_id)].num_failed += 1

    def finish(self, now: float) -> None:
        """Leave out what is missing."""
        if self.version is not None:
            self.seconds = now - self.began_at
        self.waiting.clear()
        self.done.set()

    @property
    def is_under_way(self) -> bool:
        """Whether actors are at it: it has begun, and is not done."""
        return self.version is not None and not self.done.is_set()

    @property
    def num_prompts(self) -> int:
        """The number of prompts of all sets."""
        return sum(map(len, self._works.values()))

    @property
    def num_missing(self) -> int:
        """The number of prompts that have no end yet."""
        return len(self._open)

    def _clear(self) -> None:
        """Have everything to do."""
        self._times_begun += 1
        self._open.clear()
        self.waiting.clear()
        self.sets = {name: SetScores(len(works)) for name, works in self._works.items()}
        for name, works in self._works.items():
            for work in works:
                if self._times_begun > 1:
                    # What is still out of the time before must not be taken for this one's.
                    again = f"{work.prompt_id}/{self._times_begun}"
                    work = replace(work, prompt_id=again)
                self._open[work.prompt_id] = name
                self.waiting.append(work)

"""What is to be leased next: evaluation prompts, rows to try again, then new prompts."""

import logging
from collections import deque
from dataclasses import replace

from learner.config.run import RunConfig
from learner.prompts.evaluation import Evaluation
from learner.prompts.stream import PromptStream
from protocol.groups import Group, GroupLimits
from protocol.leases import Work

log = logging.getLogger("learner")

MAX_ATTEMPTS = 3
"""A row that failed or overran its lease so often is left out."""
_ANY_VERSION = 2**31 - 1


class WorkQueue:
    """Hands out work and takes it back."""

    def __init__(self, stream: PromptStream) -> None:
        self._stream = stream
        self.retries: deque[Work] = deque()
        """Training rows to be leased again."""
        self._evaluation: Evaluation | None = None

    def start_evaluation(self, works: list[Work], version: int) -> Evaluation:
        """Evaluation work comes before any other, for actors that have ``version``."""
        self._evaluation = Evaluation(works, version)
        return self._evaluation

    def end_evaluation(self) -> None:
        """What is still out comes back for nothing."""
        self._evaluation = None

    def next_evaluation(self, actor_version: int) -> Work | None:
        """A held-out prompt for an actor that samples from ``actor_version``."""
        evaluation = self._evaluation
        if evaluation is None or not evaluation.waiting or actor_version < evaluation.version:
            return None
        return evaluation.waiting.popleft()

    def next_training(self) -> Work:
        """A row to train on; the stream has no end."""
        return self.retries.popleft() if self.retries else self._stream.next()

    @property
    def next_prompt_index(self) -> int:
        """Topology in the stream of the next new row."""
        return self._stream.next_prompt_index

    def done(self, work: Work, group: Group) -> None:
        """A valid group came back."""
        if evaluation := self._evaluation_of(work):
            evaluation.receive(work, group)

    def again(self, work: Work) -> None:
        """The actor was lost, not the row: lease it again before anything new."""
        if work.purpose == "train":
            self.retries.append(work)
        elif evaluation := self._evaluation_of(work):
            evaluation.waiting.append(work)

    def failed(self, work: Work) -> None:
        """The row could not be rolled out, or took too long: again, or left out after
        `MAX_ATTEMPTS`, because the fault may be the actor's or the row's."""
        work = replace(work, attempts=work.attempts + 1)
        if work.attempts < MAX_ATTEMPTS:
            self.again(work)
            return
        log.error("%s is left out after %d failures", work.prompt_id, work.attempts)
        if evaluation := self._evaluation_of(work):
            evaluation.give_up(work)

    def _evaluation_of(self, work: Work) -> Evaluation | None:
        """The current evaluation, if ``work`` belongs to it and not to an earlier one."""
        evaluation = self._evaluation
        if evaluation is None or work.purpose != "eval" or not evaluation.wants(work):
            return None
        return evaluation


def group_limits(config: RunConfig, vocab_size: int) -> GroupLimits:
    """What holds for every group to train on, of whatever version."""
    sampling = config.sampling
    return GroupLimits(
        num_rollouts=sampling.num_rollouts,
        reward_names=tuple(reward.name for reward in config.rewards),
        vocab_size=vocab_size,
        max_prompt_tokens=sampling.max_prompt_tokens,
        max_tokens=sampling.max_tokens,
        newest_version=_ANY_VERSION,
    )

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
"""A row that failed or overran its lease this often is left out."""
_ANY_VERSION = 2**31 - 1


class WorkQueue:
    """Hands out work and takes it back."""

    def __init__(self, stream: PromptStream) -> None:
        self._stream = stream
        self.retries: deque[Work] = deque()
        """Training rows to be leased again."""
        self.evaluation: Evaluation | None = None
        """The evaluation at hand."""
        self.training = False
        """Whether training leases are issued."""

    def next_training(self, session: str, *, alone: bool) -> Work:
        """Return a row to train on; the stream has no end.

        A row that failed goes to another actor than the one before, unless this one is ``alone``:
        a single bad one could use up all attempts.
        """
        for position, work in enumerate(self.retries):
            if alone or work.failed_on != session:
                del self.retries[position]
                return work
        return self._stream.next()

    @property
    def failed_on(self) -> str:
        """The actor on which the row that is next failed last; empty for a new one."""
        return self.retries[0].failed_on if self.retries else ""

    @property
    def next_prompt_index(self) -> int:
        """Place in the stream of the next new row."""
        return self._stream.next_prompt_index

    def done(self, work: Work, group: Group) -> None:
        """Take the valid group that came back."""
        if evaluation := self._evaluation_of(work):
            evaluation.receive(work, group)

    def again(self, work: Work) -> None:
        """Lease a row again before anything new: its actor was lost, not the row."""
        if work.purpose == "train":
            self.retries.append(work)
        elif evaluation := self._evaluation_of(work):
            evaluation.waiting.append(work)

    def failed(self, work: Work, session: str) -> bool:
        """Try a row again that an actor could not roll out, or not in time; returns whether it is.

        After `MAX_ATTEMPTS` it is left out: the fault may be the actor's or the row's.
        """
        work = replace(work, attempts=work.attempts + 1, failed_on=session)
        if work.attempts < MAX_ATTEMPTS:
            self.again(work)
            return True
        log.error("%s is left out after %d failures", work.prompt_id, work.attempts)
        if evaluation := self._evaluation_of(work):
            evaluation.give_up(work)
        return False

    def _evaluation_of(self, work: Work) -> Evaluation | None:
        """The current evaluation, if ``work`` belongs to it and not to an earlier one."""
        evaluation = self.evaluation
        if evaluation is None or work.purpose != "eval" or not evaluation.wants(work):
            return None
        return evaluation


def group_limits(config: RunConfig, vocab_size: int) -> GroupLimits:
    """Return what holds for every group to train on, whatever its version."""
    sampling = config.sampling
    return GroupLimits(
        num_rollouts=sampling.num_rollouts,
        reward_names=tuple(reward.name for reward in config.rewards),
        vocab_size=vocab_size,
        max_prompt_tokens=sampling.max_prompt_tokens,
        max_tokens=sampling.max_tokens,
        newest_version=_ANY_VERSION,
    )

"""The leases at hand: a task for each, which always ends in a group or in a failure."""

import asyncio
import logging
from collections import Counter
from functools import partial
from typing import Literal

from actors.engines.engine import UnusableRow
from actors.link import LearnerLink
from actors.rewards.pool import RewardFailure
from actors.rollouts.single_turn import RolloutWorker
from actors.session import Session
from protocol.errors import EngineError, one_line
from protocol.messages import MAX_LEASES, Failed, Lease

log = logging.getLogger("actor")

MAX_CAUSE = 1000
"""Characters of why a lease failed: a longer message would be refused."""


class Leases:
    """Rolls out leases side by side."""

    def __init__(self, link: LearnerLink, session: Session, stopping: asyncio.Event) -> None:
        """``stopping`` is set when the actor is told to stop: its engine may then end as well."""
        self._link = link
        self._session = session
        self._stopping = stopping
        self._rollouts: dict[int, asyncio.Task[None]] = {}
        self.failed: Counter[str] = Counter()
        """Leases given up, by kind of cause."""

    @property
    def at_hand(self) -> tuple[int, ...]:
        """Leases that are being worked on."""
        return tuple(self._rollouts)

    def begin(self, lease: Lease, worker: RolloutWorker, tasks: asyncio.TaskGroup) -> None:
        """Roll out a lease beside the others, unless no learner would issue it now."""
        if lease.lease in self._rollouts or len(self._rollouts) >= MAX_LEASES:
            log.warning("lease %d is one too many; not taken", lease.lease)
            return
        task = tasks.create_task(self._roll_out(lease, worker))
        self._rollouts[lease.lease] = task
        task.add_done_callback(partial(self._forget, lease.lease))

    async def finish(self, timeout_s: float) -> None:
        """Finish what can be finished in time, and cancel the rest."""
        if self._rollouts:
            log.info("finishing %d leases", len(self._rollouts))
            await asyncio.wait(list(self._rollouts.values()), timeout=timeout_s)
        self.cancel()

    def cancel(self) -> None:
        """Drop all leases."""
        for task in list(self._rollouts.values()):
            task.cancel()

    async def _roll_out(self, lease: Lease, worker: RolloutWorker) -> None:
        try:
            async with asyncio.timeout(lease.deadline_s):
                group = await worker.roll_out(lease)
        except RewardFailure as error:
            cause = one_line(str(error), MAX_CAUSE)
            await self._give_up(lease, "reward", cause, error.reward)
        except UnusableRow as error:
            await self._give_up(lease, "prompt", one_line(str(error), MAX_CAUSE))
        except EngineError:
            # Engines may get the signal that stops this actor too.
            if not self._stopping.is_set():
                raise
        except TimeoutError:
            await self._give_up(lease, "deadline", f"it took longer than {lease.deadline_s:g} s")
        else:
            await self._session.send_group(group)

    async def _give_up(
        self,
        lease: Lease,
        kind: Literal["reward", "prompt", "deadline"],
        cause: str,
        reward: str = "",
    ) -> None:
        self.failed[kind] += 1
        log.warning("lease %d (%s) failed: %s", lease.lease, lease.prompt_id, cause)
        await self._link.send(Failed(lease=lease.lease, kind=kind, cause=cause, reward=reward))

    def _forget(self, lease: int, _: asyncio.Task[None]) -> None:
        del self._rollouts[lease]

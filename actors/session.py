"""An actor's stay with its learner: hello and welcome, and groups until they are acknowledged.

Hello ──► Welcome ──► groups, each sent again until its Ack ──► Goodbye
  ▲                     │
  └── unknown session ◄─┘   after a silence: its leases are with others now
"""

import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from actors.link import HELLO_RETRY_S, LearnerLink
from protocol.errors import Refused, one_line
from protocol.framing import Buffer
from protocol.groups import Group, pack_group
from protocol.machine import machine_id
from protocol.messages import PROTOCOL_VERSION, Ack, Goodbye, Header, Hello, Pong, Welcome
from transfer.backends import gpu_identity, nccl_available

log = logging.getLogger("actor")

RESEND_AFTER_S = 10.0


def make_hello(
    session: str, *, metrics_host: str, metrics_port: int, device: torch.device
) -> Hello:
    """The first message of this process, which receives weights on ``device``."""
    return Hello(
        protocol=PROTOCOL_VERSION,
        session=session,
        host=socket.gethostname(),
        pid=os.getpid(),
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        machine=machine_id(),
        gpu=gpu_identity(device) if nccl_available() else "",
    )


@dataclass(slots=True)
class _Unacknowledged:
    header: Header
    payloads: list[Buffer]
    sent_at: float


class Session:
    """What the learner and this actor know of each other.

    Groups are kept until they are acknowledged and sent again if that takes too long; the learner
    knows a group that it already has.
    """

    def __init__(self, link: LearnerLink, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self._hello: Hello | None = None
        """The hello to say after a silence; None before the first welcome."""
        self._unacknowledged: dict[int, _Unacknowledged] = {}
        self._rejoining_since = -math.inf
        self.groups_generated = 0
        """Groups since the start of the process."""
        self.heard = -1
        """Sequence of the last `Pong`; -1 before the first."""

    @property
    def unacknowledged(self) -> tuple[int, ...]:
        """Leases whose group was sent and is not acknowledged."""
        return tuple(self._unacknowledged)

    async def join(self, hello: Hello, timeout_s: float) -> tuple[Welcome, list[memoryview]]:
        """Say hello and wait for the welcome; raises what `LearnerLink.join` raises."""
        welcome, files = await self._link.join(hello, timeout_s)
        self._hello = msgspec.structs.replace(
            hello, run_id=welcome.run_id, model_digest=welcome.model_digest
        )
        return welcome, files

    async def send_group(self, group: Group) -> None:
        """Send a group, and keep it until it is acknowledged."""
        self.groups_generated += 1
        header, payloads = pack_group(group)
        self._unacknowledged[group.lease] = _Unacknowledged(header, payloads, time.monotonic())
        await self._link.send(header, payloads)

    async def send_overdue_groups(self) -> None:
        """Send groups again whose acknowledgement takes longer than `RESEND_AFTER_S`."""
        now = time.monotonic()
        for message in self._unacknowledged.values():
            if now - message.sent_at > RESEND_AFTER_S:
                message.sent_at = now
                await self._link.send(message.header, message.payloads)

    def acknowledged(self, ack: Ack) -> None:
        """Forget a group that the learner has answered."""
        self._unacknowledged.pop(ack.lease, None)
        if ack.verdict == "rejected":
            log.info("lease %d rejected: %s", ack.lease, one_line(ack.cause))

    def answered(self, pong: Pong) -> None:
        """Note that the learner has read the `Status` of that sequence."""
        self.heard = pong.sequence

    async def join_again(self, drop_leases: Callable[[], None]) -> None:
        """Say hello again to a learner that does not know this session any more.

        It gave this actor up during a silence, and its leases are with others: ``drop_leases``
        drops them. Nothing is done while the answer to such a hello is awaited, since the learner
        says the same of each message that was on its way.
        """
        assert self._hello is not None
        if self._clock() - self._rejoining_since < HELLO_RETRY_S:
            return
        self._rejoining_since = self._clock()
        drop_leases()
        self._start_over()
        await self._link.send(self._hello)

    def joined_again(self, welcome: Welcome) -> None:
        """Note that the learner knows this actor again; raises `Refused` if its run is another."""
        assert self._hello is not None
        if welcome.run_id != self._hello.run_id:
            raise Refused(
                f"the learner now runs {welcome.run_id}, this actor was built for "
                f"{self._hello.run_id}; start it again"
            )
        self._rejoining_since = -math.inf
        self._start_over()
        log.info("joined again after a silence")

    async def leave(self, cause: str) -> None:
        """Say goodbye."""
        log.info("leaving: %s", cause)
        await self._link.send(Goodbye(cause=cause))

    def _start_over(self) -> None:
        """Forget the groups and the answers of the session before."""
        self._unacknowledged.clear()
        self.heard = -1

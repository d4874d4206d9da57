"""Members of a collective as real processes, and what holds of them whatever the backend.

The same bodies run with gloo in tests/integration/test_collective.py and with NCCL in
tests/gpu/test_nccl.py.
"""

import hashlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore

from protocol.errors import CollectiveError
from transfer.backends import create_backend
from transfer.collective import GRACE_S, BackendName, BroadcastGroup, host_store, join_store

PATIENCE_S = 20.0
"""Deadline of what is to succeed."""
SLACK_S = 0.5
"""A busy machine may be so much later than a deadline and its grace."""
LISTENING = "0A"


@dataclass(frozen=True)
class Setting:
    """What the members of a test exchange bytes with."""

    backend: BackendName
    devices: tuple[str, ...]
    """Of the members, by rank. It is also how many there can be."""
    bucket_bytes: int
    """More than a sender gets rid of while nobody receives."""
    deadline_s: float
    """Of what is to fail."""
    released_by_abort: bool
    address: str = "127.0.0.1"

    @property
    def world_size(self) -> int:
        return len(self.devices)


def make_bucket(seed: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer(
        bytearray(np.random.default_rng(seed).bytes(num_bytes)), dtype=torch.uint8
    )


def digest_of(bucket: torch.Tensor) -> str:
    return hashlib.blake2b(bucket.cpu().numpy().data, digest_size=16).hexdigest()


# --- in a member's process ------------------------------------------------------------------------


class Served:
    """A member's side of the questions that a test asks it."""

    def __init__(self, setting: Setting, device: str) -> None:
        torch.set_num_threads(1)
        self._setting = setting
        self._backend = create_backend(
            setting.backend, own_address=setting.address, device=torch.device(device)
        )
        self._store: TCPStore
        self._group: BroadcastGroup
        self._rank = 0
        self._abort_seconds = -1.0

    def host(self) -> int:
        self._store, port = host_store(self._setting.address, PATIENCE_S)
        return port

    def join(self, port: int) -> None:
        self._store = join_store(self._setting.address, port, PATIENCE_S)

    def meet(self, epoch: int, rank: int, world_size: int, timeout_s: float) -> None:
        self._rank = rank
        self._group = self._backend.meet(self._store, epoch, rank, world_size, timeout_s)

    def broadcast(self, seed: int, num_bytes: int) -> str:
        """The digest of the bucket afterwards; rank 0 fills it from the seed before."""
        with self._backend.copy_context():
            if self._rank == 0:
                bucket = make_bucket(seed, num_bytes).to(self._backend.device)
            else:
                bucket = torch.zeros(num_bytes, dtype=torch.uint8, device=self._backend.device)
            self._group.broadcast(bucket)
            return digest_of(bucket)

    def abort_in(self, seconds: float) -> None:
        def abort() -> None:
            time.sleep(seconds)
            started = time.monotonic()
            self._group.abort()
            self._abort_seconds = time.monotonic() - started

        Thread(target=abort, daemon=True).start()

    def abort_seconds(self) -> float:
        return self._abort_seconds

    def addresses(self) -> set[str]:
        """That this process listens on; those of IPv6 as the kernel writes them."""
        own = set()
        for descriptor in Path("/proc/self/fd").iterdir():
            # The one that reads the folder is gone by now.
            with suppress(FileNotFoundError):
                own.add(str(descriptor.readlink()))
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == LISTENING and f"socket:[{inode}]" in own:
                    address = local.split(":")[0]
                    if table == "tcp":
                        address = socket.inet_ntoa(struct.pack("=I", int(address, 16)))
                    found.add(address)
        return found


def _serve(connection: "Connection[Any, Any]", setting: Setting, device: str) -> None:
    served = Served(setting, device)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        started = time.monotonic()
        try:
            value, failure = getattr(served, name)(*arguments), ""
        except CollectiveError as error:
            value, failure = None, str(error)
        connection.send(Answer(value, failure, time.monotonic() - started))


# --- in the test ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    value: Any
    failure: str
    """Of a `CollectiveError`; empty if there was none."""
    seconds: float


class Member:
    """A process of its own, which answers one question after the other."""

    def __init__(self, setting: Setting, device: str) -> None:
        # Forked from a process that has imported torch, and has done nothing else with it.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.device = device
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setting, device), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, name: str, *arguments: Any) -> None:
        self._connection.send((name, arguments))

    def answer(self) -> Answer:
        assert self._connection.poll(2 * PATIENCE_S), "no answer"
        answer: Answer = self._connection.recv()
        return answer

    def call(self, name: str, *arguments: Any) -> Any:
        """The value; the test fails if there is none."""
        self.ask(name, *arguments)
        return self.value()

    def value(self) -> Any:
        answer = self.answer()
        assert not answer.failure, answer.failure
        return answer.value

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


class Crew:
    """All members of a test; none is left behind."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._everybody: list[Member] = []
        self.members = [self._start(device) for device in setting.devices]
        self._port = self.members[0].call("host")
        for member in self.members[1:]:
            member.call("join", self._port)

    def newcomer(self, device: str) -> Member:
        member = self._start(device)
        member.call("join", self._port)
        return member

    def meet(self, epoch: int, members: Sequence[Member], timeout_s: float = PATIENCE_S) -> None:
        self.ask_to_meet(epoch, members, len(members), timeout_s)
        for member in members:
            member.value()

    def ask_to_meet(
        self, epoch: int, members: Sequence[Member], world_size: int, timeout_s: float
    ) -> None:
        for rank, member in enumerate(members):
            member.ask("meet", epoch, rank, world_size, timeout_s)

    def broadcast(self, seed: int, num_bytes: int, members: Sequence[Member]) -> None:
        """Every one of them has the bytes of rank 0 after it."""
        for member in members:
            member.ask("broadcast", seed, num_bytes)
        digests = [member.value() for member in members]
        assert digests == [digest_of(make_bucket(seed, num_bytes))] * len(members)

    def fails(self, member: Member) -> Answer:
        """The member's answer is a `CollectiveError`, and it came by the deadline."""
        answer = member.answer()
        assert answer.failure
        assert answer.seconds < self.setting.deadline_s + GRACE_S + SLACK_S
        return answer

    def close(self) -> None:
        for member in self._everybody:
            member.process.kill()
        for member in self._everybody:
            member.process.join(PATIENCE_S)

    def _start(self, device: str) -> Member:
        member = Member(self.setting, device)
        self._everybody.append(member)
        return member


# --- what holds of them ---------------------------------------------------------------------------


def every_member_gets_every_byte(crew: Crew) -> None:
    crew.meet(1, crew.members)
    for seed, num_bytes in enumerate((crew.setting.bucket_bytes, 1, 3 << 20, 1_000_003)):
        crew.broadcast(seed, num_bytes, crew.members)


def epochs_follow_each_other_over_one_store(crew: Crew) -> None:
    learner, *actors = crew.members
    crew.meet(1, crew.members)
    crew.broadcast(1, 1 << 20, crew.members)
    for member in crew.members:
        member.ask("abort_in", 0.0)
        member.value()
    others = [learner, *reversed(actors)]
    crew.meet(2, others)
    crew.broadcast(2, 1 << 20, others)


def a_meeting_waits_for_a_missing_member_until_the_deadline(crew: Crew) -> None:
    *present, missing = crew.members
    world_size, deadline_s = len(crew.members), crew.setting.deadline_s
    crew.ask_to_meet(1, present, world_size, deadline_s)
    for member in present:
        answer = crew.fails(member)
        assert answer.seconds >= deadline_s
        assert f"rank {world_size - 1} of {world_size} did not come" in answer.failure
    crew.meet(2, [*present, missing])
    crew.broadcast(1, 1 << 20, crew.members)


def survivors_of_a_killed_member_go_on_with_a_newcomer(crew: Crew) -> None:
    *survivors, victim = crew.members
    crew.meet(1, crew.members, crew.setting.deadline_s)
    crew.broadcast(1, crew.setting.bucket_bytes, crew.members)
    for member in survivors:
        member.ask("broadcast", 2, crew.setting.bucket_bytes)
    victim.signal(signal.SIGKILL)
    _nobody_stays_longer_than_the_deadline(crew, survivors)
    members = [*survivors, crew.newcomer(victim.device)]
    crew.meet(2, members)
    crew.broadcast(3, crew.setting.bucket_bytes, members)


def a_stopped_member_holds_nobody_up_and_comes_back(crew: Crew) -> None:
    *others, stopped = crew.members
    crew.meet(1, crew.members, crew.setting.deadline_s)
    stopped.signal(signal.SIGSTOP)
    for member in crew.members:
        member.ask("broadcast", 1, crew.setting.bucket_bytes)
    _nobody_stays_longer_than_the_deadline(crew, others)
    if crew.setting.world_size > 2:
        crew.meet(2, others)
        crew.broadcast(2, 1 << 20, others)
    stopped.signal(signal.SIGCONT)
    assert stopped.answer().failure
    crew.meet(3, crew.members)
    crew.broadcast(3, crew.setting.bucket_bytes, crew.members)


def _nobody_stays_longer_than_the_deadline(crew: Crew, members: Sequence[Member]) -> None:
    """Rank 0 learns by its deadline that a broadcast failed; others may have got the bytes."""
    learner, *actors = members
    crew.fails(learner)
    learner.ask("broadcast", 9, crew.setting.bucket_bytes)
    assert crew.fails(learner).failure == "the epoch is over"
    for actor in actors:
        answer = actor.answer()
        assert answer.failure or answer.value
        assert answer.seconds < crew.setting.deadline_s + GRACE_S + SLACK_S
        # It is over for all of them then, at the next bucket at the latest.
        actor.ask("broadcast", 9, crew.setting.bucket_bytes)
        crew.fails(actor)


def a_meeting_at_a_frozen_learner_ends_at_the_deadline(crew: Crew) -> None:
    learner, actor = crew.members[:2]
    learner.signal(signal.SIGSTOP)
    actor.ask("meet", 1, 1, 2, crew.setting.deadline_s)
    crew.fails(actor)


def a_pending_broadcast_can_be_aborted(crew: Crew) -> None:
    actor = crew.members[1]
    crew.meet(1, crew.members, crew.setting.deadline_s)
    actor.call("abort_in", 0.2)
    # The learner sends nothing.
    actor.ask("broadcast", 1, crew.setting.bucket_bytes)
    answer = crew.fails(actor)
    assert (answer.seconds < crew.setting.deadline_s) == crew.setting.released_by_abort
    assert 0 <= actor.call("abort_seconds") < SLACK_S


BODIES: tuple[Callable[[Crew], None], ...] = (
    every_member_gets_every_byte,
    epochs_follow_each_other_over_one_store,
    a_meeting_waits_for_a_missing_member_until_the_deadline,
    survivors_of_a_killed_member_go_on_with_a_newcomer,
    a_stopped_member_holds_nobody_up_and_comes_back,
    a_meeting_at_a_frozen_learner_ends_at_the_deadline,
    a_pending_broadcast_can_be_aborted,
)

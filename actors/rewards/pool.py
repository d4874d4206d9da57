"""Reward functions in processes of their own, where they cannot take the actor down.

A process serves one call at a time, so a call that takes too long is known to be the one that
hangs; its process is killed with all that it started, and the next call starts a new one:

    call ──► idle process, or a new one ──► reply in time ──► the process is idle again
                                       └──► too late, or the process ended ──► killed

The time of a call begins when its process has imported the function; imports have a limit of their
own.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from actors.rewards.messages import (
    LENGTH_BYTES,
    MAX_REPLY_BYTES,
    Call,
    Load,
    Reply,
    decode_reply,
    frame,
)
from protocol.config import RewardConfig
from protocol.errors import RewardError, brief
from protocol.messages import FinishReason

IMPORT_TIMEOUT_S = 120.0
"""Limit of the import of one reward function: it may import torch from a slow disk."""
KILL_TIMEOUT_S = 1.0
"""Time that a guard has to end after it was hung up on; then it is killed with its worker."""

FailureKind = Literal["raised", "timeout", "died", "invalid"]

_START = (
    "import sys; sys.path[:] = sys.argv[1:]; del sys.argv[1:]; "
    "from actors.rewards.guard import main; main()"
)


class RewardFailure(RewardError):
    """A reward function failed on one group, or when it was imported."""

    def __init__(self, message: str, *, reward: str, kind: FailureKind) -> None:
        super().__init__(message)
        self.reward = reward
        self.kind: FailureKind = kind


class RewardPool:
    """Calls reward functions in up to ``processes`` processes, started when all are busy."""

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        *,
        allowed_modules: Iterable[str],
        folder: Path,
        timeout_s: float,
        processes: int,
        import_timeout_s: float = IMPORT_TIMEOUT_S,
    ) -> None:
        self._functions = {reward.name: reward.function for reward in rewards}
        self._arguments = {reward.name: dict(reward.arguments) for reward in rewards}
        self._allowed_modules = tuple(allowed_modules)
        self._folder = folder
        self._timeout_s = timeout_s
        self._import_timeout_s = import_timeout_s
        self._size = processes
        self._room = asyncio.Semaphore(processes)
        self._closed = False
        self._idle: list[_Process] = []
        self._processes: set[_Process] = set()
        self._endings: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the first process; raises `RewardFailure` if a function does not import."""
        for reward in self._functions:
            async with self._process(reward):
                pass

    async def call(
        self,
        reward: str,
        row: dict[str, Any],
        completions: list[str],
        ids: list[list[int]],
        finish: list[FinishReason],
    ) -> list[float | None]:
        """Scores [G] by one reward; raises `RewardFailure`.

        The time limit does not count the wait for a process. A cancelled call is killed.
        """
        request = Call(
            reward=reward,
            row=row,
            completions=completions,
            completion_ids=ids,
            finish=finish,
            arguments=self._arguments[reward],
        )
        async with self._process(reward) as process:
            reply = await self._ask(process, request, self._timeout_s, f"reward {reward!r}")
        if reply.problem:
            message = f"reward {reward!r} {reply.problem}"
            raise RewardFailure(message, reward=reward, kind=reply.kind)
        if len(reply.scores) != len(completions):
            message = f"reward {reward!r} answered {len(reply.scores)} scores past its process"
            raise RewardFailure(message, reward=reward, kind="invalid")
        return reply.scores

    async def close(self) -> None:
        """Kill every process and return when all are gone.

        Calls that are going on or wait for a process fail.
        """
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(process.end() for process in self._processes))
        # The places of calls that were going on are free when their processes are gone.
        for _ in range(self._size):
            await self._room.acquire()

    @contextlib.asynccontextmanager
    async def _process(self, reward: str) -> AsyncIterator["_Process"]:
        """A process that has imported the function; killed if what is done with it raises."""
        await self._room.acquire()
        process = self._pop_idle()
        try:
            if process is None:
                process = await self._start_process(reward)
            await self._load(process, reward)
            yield process
        except BaseException:
            self._discard(process)
            raise
        self._idle.append(process)
        self._room.release()

    def _pop_idle(self) -> "_Process | None":
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            process.hang_up()
            self._processes.discard(process)
        return None

    async def _start_process(self, reward: str) -> "_Process":
        try:
            process = await _Process.start()
        except OSError as error:
            message = f"reward {reward!r} has no process: it does not start: {brief(error)}"
            raise RewardFailure(message, reward=reward, kind="died") from error
        self._processes.add(process)
        if self._closed:
            process.hang_up()
        return process

    async def _load(self, process: "_Process", reward: str) -> None:
        """Have the process import a function before its first call."""
        if reward in process.loaded:
            return
        request = Load(
            reward=reward,
            function=self._functions[reward],
            allowed_modules=self._allowed_modules,
            folder=str(self._folder),
        )
        what = f"the import of reward {reward!r}"
        reply = await self._ask(process, request, self._import_timeout_s, what)
        if reply.problem:
            raise RewardFailure(reply.problem, reward=reward, kind=reply.kind)
        process.loaded.add(reward)

    async def _ask(
        self, process: "_Process", request: Load | Call, timeout_s: float, what: str
    ) -> Reply:
        name = request.reward
        place = f"({self._functions[name]})"
        try:
            async with asyncio.timeout(timeout_s):
                return await process.ask(request)
        except TimeoutError:
            message = f"{what} took longer than {timeout_s:g} s and was killed {place}"
            raise RewardFailure(message, reward=name, kind="timeout") from None
        except (OSError, EOFError):
            message = f"{what} ended its process: {_how(await process.end())} {place}"
            raise RewardFailure(message, reward=name, kind="died") from None
        except msgspec.MsgspecError as error:
            message = f"{what} wrote into the channel of its process: {error} {place}"
            raise RewardFailure(message, reward=name, kind="invalid") from None

    def _discard(self, process: "_Process | None") -> None:
        """Kill a process; its place is free when it is gone."""
        ending = asyncio.create_task(self._end(process))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _end(self, process: "_Process | None") -> None:
        if process is not None:
            await process.end()
            self._processes.discard(process)
        self._room.release()


class _Process:
    """A guard, its worker, and the actor's end of the channel to them."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.loaded: set[str] = set()
        """Rewards whose functions it has imported."""

    @classmethod
    async def start(cls) -> "_Process":
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-u", "-c", _START, *sys.path),
                stdin=theirs.fileno(),
                # What functions print belongs in the log, with standard error.
                stdout=2,
                # Functions run side by side: one thread each is enough.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                # Out of the reach of Ctrl-C, which the actor answers.
                start_new_session=True,
            )
        except BaseException:
            writer.close()
            raise
        finally:
            theirs.close()
        return cls(process, reader, writer)

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; to be asked between two calls.

        Nothing comes from it then: what can be read is its end, which the event loop may not have
        seen yet.
        """
        if self._process.returncode is not None or self._reader.at_eof():
            return False
        channel = select.poll()
        channel.register(self._writer.get_extra_info("socket"), select.POLLIN)
        return not channel.poll(0)

    async def ask(self, request: Load | Call) -> Reply:
        """Send a request and wait for its reply.

        Raises EOFError or OSError if the process ends, MsgspecError for what is no reply.
        """
        self._writer.write(frame(request))
        await self._writer.drain()
        length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
        if length > MAX_REPLY_BYTES:
            raise msgspec.ValidationError(f"a reply of {length} bytes")
        return decode_reply(await self._reader.readexactly(length))

    def hang_up(self) -> None:
        """Have the guard kill everything."""
        self._writer.close()

    async def end(self) -> int:
        """Hang up and wait for its end; returns the exit code, or a signal's number negated."""
        self.hang_up()
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                return await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            return await self._process.wait()


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", maybe for its memory" if name == "SIGKILL" else "")

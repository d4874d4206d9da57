"""A TCP proxy between actors and learner that can delay, cut and freeze the links through it.

Only the actors' messages pass it (the link of ZeroMQ); the weights' collective meets at an address
of the learner's own, as it would in a private network beside it.

    running ──► cut: every connection is reset, new ones are refused     ──► running
            └─► frozen: nothing is forwarded, every socket stays open    ──► running
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from threading import Thread, Timer
from typing import Any, Literal

Direction = Literal["up", "down"]
"""``up`` is from the actors to the learner."""
_CHUNK = 1 << 16


class Proxy:
    """Runs on a thread of its own; every command may be given from any other."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").partition(":")
        self._target = host, int(port)
        self.delay_s = 0.0
        """One way, both ways."""
        self.attempts: list[float] = []
        """When somebody connected, answered or not."""
        self._resetting = False
        self._down_until = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._flows = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._port = 0
        self._server: asyncio.Server | None = None
        self._thread = Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._call(self._open)

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"

    def cut(self, *, refuse: Literal["by kernel", "after accepting"] = "by kernel") -> None:
        """Reset every connection and refuse new ones until `restore`.

        The kernel refuses as it does where no process listens; a load balancer whose target is
        gone accepts first, and only then is an attempt seen, and counted.
        """
        self._call(lambda: self._cut(refuse == "after accepting"))

    def cut_for(self, seconds: float) -> None:
        """Cut; of cuts that overlap the last one to end restores the links."""
        self._down_until = max(self._down_until, time.monotonic() + seconds)
        self.cut()
        Timer(seconds, self._restore_if_over).start()

    def freeze(self, *directions: Direction) -> None:
        """Forward nothing until `restore`: half-open links."""
        for direction in directions or ("up", "down"):
            self._loop.call_soon_threadsafe(self._flows[direction].clear)

    def restore(self) -> None:
        """What was frozen arrives now, as late as it is."""
        self._call(self._open)

    def attempts_per_second(self, since: float) -> Counter[int]:
        """Connection attempts by the second after ``since``."""
        return Counter(int(at - since) for at in self.attempts if at >= since)

    def close(self) -> None:
        self._call(lambda: self._cut(False))
        self._call(self._end_tasks)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _restore_if_over(self) -> None:
        if time.monotonic() >= self._down_until:
            self.restore()

    # --- on the proxy's thread ------------------------------------------------------------------

    def _call(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run_coroutine_threadsafe(function(), self._loop).result(10)

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self) -> None:
        self._resetting = False
        for flow in self._flows.values():
            flow.set()
        if self._server is None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self._port, backlog=1024
            )
            self._port = self._server.sockets[0].getsockname()[1]

    async def _cut(self, accepting: bool) -> None:
        self._resetting = accepting
        if not accepting and self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attempts.append(time.monotonic())
        if self._resetting:
            _reset(writer)
            return
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            return
        self._writers |= {writer, back}
        try:
            await asyncio.gather(
                self._forward(reader, back, "up"), self._forward(there, writer, "down")
            )
        finally:
            for end in (writer, back):
                self._writers.discard(end)
                end.close()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await asyncio.sleep(self.delay_s)
                await self._flows[direction].wait()
                writer.write(data)
                await writer.drain()
        # Nobody hears of an end on a frozen link either.
        await self._flows[direction].wait()
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: what was on its way is lost."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

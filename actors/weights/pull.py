"""Weights pulled over ZeroMQ: only missing chunks, as differences where that is less."""

import asyncio
import logging
import math
import time
from collections import deque

import torch

from actors.link import LearnerLink
from actors.weights.receive_buffer import ReceiveBuffer, WriteTurn
from protocol import chunk_codec
from protocol.errors import BadMessage, PeerLost
from protocol.messages import WeightsChunk, WeightsPull

log = logging.getLogger("actor")

PULLS_IN_FLIGHT = 16
PULL_RETRY_S = 5.0
"""Time without any chunk after which missing ones are asked for again.

It is not counted for each chunk: on a slow link one waits behind those before it, and what is asked
for twice is sent twice, which makes the link slower still."""


class Gone(Exception):
    """The version being pulled has been replaced."""


class Pull:
    """Completes one version in the buffer that a turn writes to."""

    def __init__(
        self,
        link: LearnerLink,
        turn: WriteTurn,
        loaded: ReceiveBuffer,
        width: int,
        timeout_s: float,
    ) -> None:
        """Prepare to pull what is missing.

        ``loaded`` may hold older chunks, as a base for differences; it may be the turn's buffer.
        ``width`` is the size in bytes of one number (`protocol.weights.item_bytes`).
        """
        self._link = link
        self._version = turn.version
        self._target = turn.buffer
        self._turn = turn
        self._loaded = loaded
        self._width = width
        self._timeout_s = timeout_s
        self._todo = deque(self._target.missing(self._version))
        self._answers: dict[int, asyncio.Future[tuple[WeightsChunk, list[memoryview]]]] = {}
        self._answered_at = time.monotonic()

    def answer(self, message: WeightsChunk, payloads: list[memoryview]) -> None:
        """Hand over a chunk that arrived."""
        future = self._answers.get(message.chunk)
        if message.version == self._version and future is not None and not future.done():
            self._answered_at = time.monotonic()
            future.set_result((message, payloads))

    async def run(self) -> None:
        """Pull all missing chunks; raises `Gone` or `PeerLost`, in an exception group."""
        async with asyncio.TaskGroup() as workers:
            for _ in range(PULLS_IN_FLIGHT):
                workers.create_task(self._work())

    async def _work(self) -> None:
        while self._todo:
            chunk = self._todo.popleft()
            # The difference first; what that does not lead to comes in full.
            for base in (self._base(chunk), None, None):
                if await self._pull(chunk, base):
                    break
            else:
                raise PeerLost(
                    f"chunk {chunk} of version {self._version} of the weights always comes damaged"
                )

    async def _pull(self, chunk: int, base: ReceiveBuffer | None) -> bool:
        """Whether the chunk arrived undamaged."""
        message, payloads = await self._ask(chunk, base.version_of(chunk) if base else None)
        if not payloads:
            raise Gone
        data = self._decode(message, payloads, base, chunk)
        if data is None or chunk_codec.checksum(data) != message.checksum:
            return False
        begin, _ = self._target.span(chunk)
        self._turn.write(begin, torch.frombuffer(data, dtype=torch.uint8))
        return True

    def _decode(
        self,
        message: WeightsChunk,
        payloads: list[memoryview],
        base: ReceiveBuffer | None,
        chunk: int,
    ) -> bytearray | None:
        """The chunk's bytes; None if they cannot be made of what came."""
        try:
            if message.base is None:
                begin, end = self._target.span(chunk)
                data = bytearray(end - begin)
                chunk_codec.decode_full(message.encoding, payloads[0], data, self._width)
                return data
            if base is not None and message.base == base.version_of(chunk):
                data = bytearray(base.read(chunk))
                chunk_codec.apply_patches(data, payloads, self._width)
                return data
        except BadMessage as error:
            log.debug("chunk %d: %s", chunk, error)
        return None

    def _base(self, chunk: int) -> ReceiveBuffer | None:
        """The buffer that holds the newest bytes of a chunk, of any version."""
        buffers = [b for b in (self._loaded, self._target) if b.version_of(chunk) is not None]
        return max(buffers, key=lambda b: b.version_of(chunk) or 0, default=None)

    async def _ask(self, chunk: int, base: int | None) -> tuple[WeightsChunk, list[memoryview]]:
        """Ask for a chunk, and again when no answer comes at all; raises `PeerLost`."""
        future: asyncio.Future[tuple[WeightsChunk, list[memoryview]]]
        future = asyncio.get_running_loop().create_future()
        self._answers[chunk] = future
        request = WeightsPull(version=self._version, chunk=chunk, base=base)
        began = now = time.monotonic()
        asked_at = -math.inf
        try:
            while (deadline := max(began, self._answered_at) + self._timeout_s) > now:
                if asked_at < began or now >= max(asked_at, self._answered_at) + PULL_RETRY_S:
                    asked_at = now
                    await self._link.send(request)
                again_at = max(asked_at, self._answered_at) + PULL_RETRY_S
                await asyncio.wait({future}, timeout=min(again_at, deadline) - now)
                if future.done():
                    return future.result()
                now = time.monotonic()
        finally:
            del self._answers[chunk]
        raise PeerLost(f"the learner at {self._link.url} sends no weights")

"""The receiving end of weights: by collective broadcast, or pulled in chunks; then one loader.

    announcement ──► collective: join the epoch, receive buckets on a side thread ─┐
                 └─► stream: pull chunks over ZeroMQ ──────────────────────────────┤
                        ▲                                                          ▼
                        └── whatever fails ◄── digest of the bytes ── engine loads between tokens
                                                                                   ▼
                                                    WeightsReady with the digest of the parameters

The engine keeps generating while bytes arrive; only loading stops it. Bytes whose digest is wrong
are never loaded, so the engine always holds one complete version. Announcements are not queued:
the newest one wins.
"""

import asyncio
import logging
import time
from collections import deque
from datetime import timedelta
from typing import Literal

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import ProcessGroupGloo

from actors.engine import Engine
from actors.link import LearnerLink
from actors.threads import in_daemon_thread
from protocol.errors import EngineError, PeerLost, brief
from protocol.messages import Weights, WeightsChunk, WeightsPull, WeightsReady
from protocol.sockets import address_towards, parse_tcp
from protocol.weights import TensorSpec, chunks, packed_digests, total_bytes, whole_digest

log = logging.getLogger("actor")

PULLS_IN_FLIGHT = 4
PULL_RETRY_S = 5.0


class _Gone(Exception):
    """The version being pulled has been replaced."""


class WeightsReceiver:
    """Brings the engine to the newest announced version."""

    def __init__(
        self, link: LearnerLink, engine: Engine, specs: list[TensorSpec], timeout_s: float
    ) -> None:
        self._link = link
        self._engine = engine
        self._specs = specs
        self._timeout_s = timeout_s
        self._collective = _Collective(link.url)
        try:
            self._buffer = engine.allocate(total_bytes(specs))
        except (RuntimeError, MemoryError, OSError) as error:
            size = total_bytes(specs)
            raise EngineError(f"no {size} bytes to receive weights in: {brief(error)}") from error
        self._announcement: Weights | None = None
        self._announced = asyncio.Event()
        self._chunks: dict[int, asyncio.Future[memoryview | None]] = {}
        self._pulling = -1
        self._starts_over = False

    def announce(self, announcement: Weights) -> None:
        """A new version exists; `run` takes the newest."""
        self._announcement = announcement
        self._announced.set()

    def start_over(self) -> None:
        """The learner may be another process now, which resumed from an older version."""
        self._collective = _Collective(self._link.url)
        self._starts_over = True

    def chunk(self, message: WeightsChunk, payloads: list[memoryview]) -> None:
        """A chunk that `_pull` asked for; others are late answers."""
        future = self._chunks.get(message.offset)
        if message.version == self._pulling and future is not None and not future.done():
            future.set_result(payloads[0] if payloads else None)

    async def run(self) -> None:
        """Follow announcements until cancelled; raises `EngineError` or `PeerLost`."""
        while True:
            await self._announced.wait()
            self._announced.clear()
            assert self._announcement is not None
            if self._starts_over or self._announcement.version >= self._engine.version:
                self._starts_over = False
                await self._update(self._announcement)

    async def _update(self, announcement: Weights) -> None:
        if announcement.num_bytes != len(self._buffer):
            raise EngineError(
                f"version {announcement.version} has {announcement.num_bytes} bytes of weights, "
                f"the model {len(self._buffer)}"
            )
        started = time.monotonic()
        route: Literal["collective", "stream"] = "collective"
        if announcement.epoch is None or not await self._receive(announcement):
            route = "stream"
            if not await self._pull(announcement):
                return
        received = time.monotonic()
        digest, load_seconds = await self._engine.load_weights(
            announcement.version, self._buffer, self._specs
        )
        await self._link.send(
            WeightsReady(
                version=announcement.version,
                digest=digest,
                route=route,
                receive_seconds=received - started,
                load_seconds=load_seconds,
            )
        )

    async def _receive(self, announcement: Weights) -> bool:
        """Whether the collective brought the announced bytes."""
        try:
            await in_daemon_thread(lambda: self._collective.receive(announcement, self._buffer))
        except Exception as error:
            # A member died or was late: the epoch is over for everybody. The stream works anyway.
            log.info("collective of epoch %s ended early; pulling", announcement.epoch)
            log.debug("%s", brief(error))
            return False
        return await self._is_intact(announcement)

    async def _pull(self, announcement: Weights) -> bool:
        """Pull all chunks, several at a time; False if the version was replaced meanwhile."""
        self._pulling = announcement.version
        todo = deque(chunks(announcement.num_bytes))
        gone = False
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(PULLS_IN_FLIGHT):
                    workers.create_task(self._pull_chunks(announcement.version, todo))
        except* _Gone:
            gone = True
        finally:
            self._pulling = -1
            self._chunks.clear()
        if gone:
            return False
        if not await self._is_intact(announcement):
            raise EngineError(
                f"the weights of version {announcement.version} arrived damaged: their digest is "
                f"not {announcement.digest}"
            )
        return True

    async def _pull_chunks(self, version: int, todo: deque[tuple[int, int]]) -> None:
        while todo:
            offset, num_bytes = todo.popleft()
            data = await self._pull_chunk(version, offset, num_bytes)
            if data is None:
                raise _Gone
            if data.nbytes != num_bytes:
                raise EngineError(f"a chunk of {data.nbytes} bytes instead of {num_bytes}")
            self._buffer.numpy()[offset : offset + num_bytes] = data

    async def _pull_chunk(self, version: int, offset: int, num_bytes: int) -> memoryview | None:
        """One chunk, asked for again while the link is down; raises `PeerLost` in the end."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            future = asyncio.get_running_loop().create_future()
            self._chunks[offset] = future
            await self._link.send(WeightsPull(version=version, offset=offset, num_bytes=num_bytes))
            try:
                return await asyncio.wait_for(future, PULL_RETRY_S)
            except TimeoutError:
                continue
        raise PeerLost(f"the learner at {self._link.url} sends no weights")

    async def _is_intact(self, announcement: Weights) -> bool:
        # A large model takes seconds, in which the event loop has to go on.
        digests = await in_daemon_thread(
            lambda: packed_digests(self._buffer.numpy().data, self._specs)
        )
        return whole_digest(digests, self._specs) == announcement.digest


class _Collective:
    """This actor's membership in the current epoch's gloo group."""

    def __init__(self, learner_url: str) -> None:
        self._host, port = parse_tcp(learner_url)
        self._own_address = address_towards(self._host, port)
        self._store: TCPStore | None = None
        self._epoch: int | None = None
        self._group: ProcessGroupGloo | None = None

    def receive(self, announcement: Weights, buffer: torch.Tensor) -> None:
        """Receive all buckets into ``buffer``; any failure (RuntimeError) ends the membership."""
        timeout = timedelta(seconds=announcement.timeout_s)
        try:
            if announcement.epoch != self._epoch or self._group is None:
                self._group, self._epoch = self._join(announcement, timeout), announcement.epoch
            for offset, num_bytes in chunks(announcement.num_bytes, announcement.bucket_bytes):
                bucket = buffer[offset : offset + num_bytes]
                self._group.broadcast(bucket, 0, timeout).wait(timeout)  # type: ignore[attr-defined]
        except Exception:
            self._store, self._group, self._epoch = None, None, None
            raise

    def _join(self, announcement: Weights, timeout: timedelta) -> ProcessGroupGloo:
        if not 1 <= announcement.rank < announcement.world_size:
            raise ValueError(f"rank {announcement.rank} of {announcement.world_size}")
        if self._store is None:
            self._store = TCPStore(
                self._host,
                announcement.store_port,
                is_master=False,
                timeout=timeout,
                wait_for_workers=False,
            )
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=self._own_address)]
        store = PrefixStore(f"weights/{announcement.epoch}", self._store)
        return ProcessGroupGloo(store, announcement.rank, announcement.world_size, options)

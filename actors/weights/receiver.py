"""The receiving end of weights: three routes into one buffer, then one loader.

    announcement ─┬─► collective: buckets of a broadcast      ─┐
                  ├─► shared: the learner's memory, read       ├─► digests ─► engine loads ─► ready
                  └─► stream: chunks, or their differences    ─┘     │            between tokens
                          ▲                                          │
                          └── what another route left missing, or damaged ◄──┘

The engine keeps generating while bytes arrive; only loading stops it. A tensor whose digest is
wrong is never loaded, so the engine always holds one complete version. Announcements are not
queued: the newest one wins, and a transfer that it interrupts leaves the chunks that it got.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Literal

import torch

from actors.engines.engine import Engine
from actors.link import LearnerLink
from actors.threads import in_daemon_thread
from actors.weights.broadcast import Collective
from actors.weights.pull import Gone, Pull
from actors.weights.receive_buffer import ReceiveBuffer, WriteTurn
from actors.weights.shared_memory import read_shared
from protocol.errors import EngineError, brief
from protocol.messages import Route, Weights, WeightsChunk, WeightsReady
from protocol.weights import TensorSpec, differing, item_bytes, total_bytes, whole_digest
from transfer.shared_memory import SharedMemory

log = logging.getLogger("actor")

MAX_PULLS = 3
"""Times that one version is pulled when what comes is damaged again and again."""


class WeightsReceiver:
    """Brings the engine to the newest announced version."""

    def __init__(
        self,
        link: LearnerLink,
        engine: Engine,
        specs: list[TensorSpec],
        timeout_s: float,
        device: torch.device,
    ) -> None:
        """Allocate the buffers; raises `EngineError` if there is no memory for them.

        ``timeout_s`` is how long the learner may be silent while it is asked for chunks; ``device``
        is where the NCCL backend receives.
        """
        self._link = link
        self._engine = engine
        self._specs = specs
        self._timeout_s = timeout_s
        self._device = device
        self._collective = Collective(link.url, device)
        self._next = self._allocate()
        self._loaded = self._allocate() if engine.in_place else self._next
        """Holds what the engine holds, unless a transfer into it has begun."""
        self._offer: tuple[Weights, bytes] | None = None
        self._announced = asyncio.Event()
        self._in_progress: Weights | None = None
        """Offer that is being received or loaded; the same offer again does not interrupt it."""
        self._starts_over = False
        self._stage: Literal["receives", "checks", "loads"] = "receives"
        self._current_pull: Pull | None = None
        self._ready: tuple[WeightsReady, bytes] | None = None
        """Message that told the learner of the weights in use, with their digests."""

    @property
    def loading(self) -> int:
        """Version all bytes of which are here, until the engine has it and says so; -1 without."""
        offer = self._in_progress
        return -1 if offer is None or self._stage == "receives" else offer.version

    def announce(self, offer: Weights, payloads: list[memoryview]) -> None:
        """Note that a new version exists; `run` follows the newest."""
        if self._offer is not None and not self._starts_over:
            newest = self._offer[0]
            # In a broadcast others wait for this actor, whatever it was offered since.
            is_late = offer.version < newest.version and offer.epoch is None
            if is_late or offer == newest == self._in_progress:
                return
        self._offer = (offer, bytes(payloads[0]) if payloads else b"")
        self._announced.set()

    def start_over(self) -> None:
        """Forget all versions: the learner may be a new process, resumed from an older one."""
        self._new_collective()
        self._starts_over = True

    def chunk(self, message: WeightsChunk, payloads: list[memoryview]) -> None:
        """Hand a chunk to the pull in progress; without one it is a late answer."""
        if self._current_pull is not None:
            self._current_pull.answer(message, payloads)

    async def run(self) -> None:
        """Follow announcements until cancelled; raises `EngineError` or `PeerLost`."""
        while True:
            await self._announced.wait()
            self._announced.clear()
            assert self._offer is not None
            offer, digests = self._offer
            if not self._starts_over and offer.version < self._engine.version:
                continue
            if self._starts_over:
                self._starts_over, self._ready = False, None
                self._next.forget()
                self._loaded.forget()
            self._in_progress = offer
            await self._until_announced(self._update(offer, digests))
            self._in_progress = None

    async def _until_announced(self, update: Coroutine[Any, Any, None]) -> None:
        """Run an update; a newer announcement interrupts it, except while the engine loads."""
        task = asyncio.ensure_future(update)
        announced = asyncio.ensure_future(self._announced.wait())
        try:
            await asyncio.wait({task, announced}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self._stage != "loads":
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()
        finally:
            announced.cancel()
            task.cancel()

    async def _update(self, offer: Weights, digests: bytes) -> None:
        self._check(offer, digests)
        if self._ready is not None and self._ready[0].version == offer.version:
            if self._ready[0].digest != offer.digest:
                # What the engine made of it was wrong, so what it was made from may be wrong too.
                self._next.forget()
                self._loaded.forget()
            elif offer.epoch is None:
                # The learner asks again after a broadcast that others did not get.
                await self._confirm(*self._ready)
                return
            # In a broadcast the others need this actor, whatever it has.
        started = time.monotonic()
        route = await self._receive(offer)
        if route is None:
            return
        try:
            self._stage = "checks"
            if await self._intact(offer, digests):
                self._stage = "loads"
                await self._load(offer, route, time.monotonic() - started)
        finally:
            self._stage = "receives"

    def _check(self, offer: Weights, digests: bytes) -> None:
        size = total_bytes(self._specs)
        if offer.num_bytes != size:
            raise EngineError(
                f"version {offer.version} has {offer.num_bytes} bytes of weights, the model {size}"
            )
        try:
            agrees = whole_digest(digests, self._specs) == offer.digest
        except ValueError:
            agrees = False
        if not agrees:
            raise EngineError(f"the digests of version {offer.version} contradict each other")

    # --- routes ---------------------------------------------------------------------------------

    async def _receive(self, offer: Weights) -> Route | None:
        """Fill the buffer; returns the route that completed it, or None if the version is gone."""
        route: Route = "stream"
        turn = self._next.begin(offer.version)
        if offer.epoch is not None:
            route = "collective"
            await self._receive_broadcast(offer, turn)
        elif offer.shared:
            route = "shared"
            await self._read_shared(offer, turn)
        # The writer before may still write.
        turn = self._next.begin(offer.version)
        if not self._next.missing(offer.version):
            return route
        return "stream" if await self._pull_missing(turn) else None

    async def _receive_broadcast(self, offer: Weights, turn: WriteTurn) -> None:
        collective = self._collective
        try:
            await in_daemon_thread("broadcast", lambda: collective.receive(offer, turn))
        except asyncio.CancelledError:
            self._new_collective()
            raise
        except Exception as error:
            # A member died or was late: the epoch is over for everybody. The stream works anyway.
            log.info("collective of epoch %s ended early; pulling the rest", offer.epoch)
            log.debug("%s", brief(error))
            self._new_collective()

    async def _read_shared(self, offer: Weights, turn: WriteTurn) -> None:
        try:
            await in_daemon_thread(
                "shared-memory", lambda: read_shared(offer.shared, offer.num_bytes, turn)
            )
        except (OSError, ValueError, RuntimeError) as error:
            log.info("the learner's memory cannot be read (%s); pulling", brief(error))

    async def _pull_missing(self, turn: WriteTurn) -> bool:
        """Pull what is missing; returns False if the version was replaced meanwhile."""
        self._current_pull = Pull(
            self._link, turn, self._loaded, item_bytes(self._specs), self._timeout_s
        )
        gone = False
        try:
            await self._current_pull.run()
        except* Gone:
            gone = True
        finally:
            self._current_pull = None
        return not gone

    def _new_collective(self) -> None:
        self._collective.abort()
        self._collective = Collective(self._link.url, self._device)

    # --- loading --------------------------------------------------------------------------------

    async def _intact(self, offer: Weights, digests: bytes) -> bool:
        """Pull again what is damaged; returns False if the version is gone."""
        for _ in range(MAX_PULLS):
            arrived = await _digests(self._next)
            wrong = differing(self._specs, digests, arrived)
            if not wrong:
                return True
            log.warning("version %d: %s arrived damaged", offer.version, ", ".join(wrong[:3]))
            self._next.forget(wrong)
            if not await self._pull_missing(self._next.begin(offer.version)):
                return False
        raise EngineError(
            f"{wrong[0]} of version {offer.version} arrives damaged, {MAX_PULLS} times in a row"
        )

    async def _load(self, offer: Weights, route: Route, receive_seconds: float) -> None:
        buffer, engine = self._next, self._engine
        load_seconds = await engine.load_weights(offer.version, buffer.memory, self._specs)
        if engine.in_place:
            self._loaded, self._next = buffer, self._loaded
            digests = await _digests(buffer)
        else:
            held = await in_daemon_thread("digests", lambda: engine.digests(self._specs))
            digests = held or await _digests(buffer)
        ready = WeightsReady(
            version=offer.version,
            digest=whole_digest(digests, self._specs),
            route=route,
            receive_seconds=receive_seconds,
            load_seconds=load_seconds,
        )
        self._ready = (ready, digests)
        await self._confirm(ready, digests)

    async def _confirm(self, ready: WeightsReady, digests: bytes) -> None:
        # From here on the same offer asks for a new answer.
        self._in_progress = None
        await self._link.send(ready, [digests])

    def _allocate(self) -> ReceiveBuffer:
        size = total_bytes(self._specs)
        try:
            return ReceiveBuffer(SharedMemory(size, pinned=self._engine.pinned), self._specs)
        except (RuntimeError, MemoryError, OSError) as error:
            raise EngineError(f"no {size} bytes to receive weights in: {brief(error)}") from error


async def _digests(buffer: ReceiveBuffer) -> bytes:
    """The digests of what is in a buffer."""
    if buffer.digests_known:
        # A thread would take longer to start than this does.
        return buffer.digests()
    # A large model takes seconds, in which the event loop has to go on.
    return await in_daemon_thread("digests", buffer.digests)

"""The actor process: joins a learner, rolls out leases, follows its weights.

Loops and tasks, all on the main thread's event loop:

| task      | consumes         | waits for           | unblocked by      | produces         |
|-----------|------------------|---------------------|-------------------|------------------|
| build     | the welcome      | rewards, the engine | their start       | `Parts`          |
| receive   | messages         | the learner         | the learner       | tasks, events    |
| roll out  | one lease each   | engine, rewards     | finished requests | one group each   |
| weights   | announcements    | a newer version     | the learner       | updates          |
| update    | one announcement | bytes, the engine   | the learner       | `WeightsReady`   |
| pull, 16  | missing chunks   | answers             | the learner       | `WeightsPull`    |
| heartbeat | -                | its interval        | the clock         | `Status`, groups |
| watch     | handshakes       | a reconnection      | the learner       | -, or a refusal  |
| end       | a reward process | its end             | the kernel        | room for another |

Threads, all daemons:

| thread          | does                                                   | until              |
|-----------------|--------------------------------------------------------|--------------------|
| http            | serves metrics; each request on a thread of its own    | the actor leaves   |
| engine          | decodes and loads weights (transformers)               | the engine closes  |
| ahead           | computes rows in flight with new weights, on CPUs      | they are computed  |
| start-vllm      | starts vLLM                                            | it has started     |
| close-engine    | waits for the engine's end                             | it has ended       |
| broadcast       | receives weights in a collective                       | they arrived       |
| collective      | one call of torch that cannot be interrupted           | it returns         |
| nccl-abort      | aborts a communicator                                  | its kernels ended  |
| shared-memory   | reads the learner's memory                             | it is read         |
| digests         | hashes weights that arrived, or that the engine holds  | they are hashed    |
| asyncio-waitpid | waits for a reward process, one each (Python's own)    | the process ended  |
| hang-up         | in the guard of a reward process: watches the actor    | the actor hangs up |
| exit-with-actor | in vLLM's engine process: watches the actor            | the actor ended    |

A lease ends in exactly one `GroupHeader` or `Failed`.
"""

import asyncio
import logging
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from actors.build import Builder, Parts
from actors.leases import Leases
from actors.link import LearnerLink
from actors.metrics import StatusCollector
from actors.rewards.functions import DEFAULT_MODULES
from actors.session import Session, make_hello
from protocol.errors import EngineError, PeerLost, Refused, brief, one_line
from protocol.keys import ActorKeys
from protocol.messages import (
    MAX_LEASES,
    Ack,
    Drain,
    Error,
    Lease,
    Pong,
    Status,
    Weights,
    WeightsChunk,
    Welcome,
)
from protocol.observability import Heartbeat, ObservabilityServer

log = logging.getLogger("actor")

DRAIN_TIMEOUT_S = 5.0
"""Together with the engine's end and the last messages this is less than the ten seconds that
whoever stops a process waits before killing it."""


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """An actor's command line; the rest is in the welcome."""

    learner: str
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    connect_timeout_s: float = 30.0
    keys: ActorKeys | None = None
    """None only for a learner on this machine."""
    allowed_modules: tuple[str, ...] = DEFAULT_MODULES
    folder: Path = field(default_factory=Path.cwd)
    """Reward modules that lie here may be imported too."""


class Actor:
    """One inference actor; `run` returns when the run is over or the actor is told to stop."""

    def __init__(self, options: ActorOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._started = time.monotonic()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._stopping = asyncio.Event()
        self._stop_cause = ""
        # ZeroMQ silently ignores the second of two peers with one id: it is random.
        self._link = LearnerLink(options.learner, uuid.uuid4().hex, options.keys)
        self._session = Session(self._link, clock)
        self._leases = Leases(self._link, self._session, self._stopping)
        self._parts: Parts | None = None
        self._sequence = 0
        self._heartbeat = Heartbeat("loop", limit_s=30.0)

    def stop(self, cause: str) -> None:
        """Finish the leases at hand, say goodbye and return from `run`. Call it on the loop."""
        self._stop_cause = self._stop_cause or cause
        self._stopping.set()

    async def run(self) -> None:
        """Join, work, leave. Raises the errors of `protocol.errors`."""
        server = self._serve_metrics()
        try:
            hello = make_hello(
                self._link.session,
                metrics_host=self._options.metrics_host,
                metrics_port=server.port,
                device=self._device,
            )
            welcome, files = await self._session.join(hello, self._options.connect_timeout_s)
            log.info("joined run %s; metrics on %s", welcome.run_id, server.address)
            await self._work_and_leave(welcome, files)
        finally:
            self._link.close()
            server.close()

    async def _work_and_leave(self, welcome: Welcome, files: list[memoryview]) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop, signal.Signals(signum).name)
        goodbye = "error"
        async with AsyncExitStack() as closing:
            try:
                self._parts = await self._build(welcome, files, closing)
                if self._parts is not None:
                    await self._work(self._parts)
                goodbye = self._stop_cause
            except BaseExceptionGroup as errors:
                # The loops fail one at a time; the first failure cancels the others.
                error = _first(errors)
                goodbye = f"error: {brief(error)}"
                raise error from None
            except Exception as error:
                goodbye = f"error: {brief(error)}"
                raise
            finally:
                await self._session.leave(goodbye)

    async def _build(
        self, welcome: Welcome, files: list[memoryview], closing: AsyncExitStack
    ) -> Parts | None:
        """Build all parts; None if told to stop meanwhile: engines take up to minutes."""
        builder = Builder(
            link=self._link,
            device=self._device,
            allowed_modules=self._options.allowed_modules,
            folder=self._options.folder,
            closing=closing,
        )
        build = asyncio.create_task(builder.build(welcome, files))
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({build, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not build.done():
            build.cancel()
            await asyncio.wait({build})
            return None
        return build.result()

    async def _work(self, parts: Parts) -> None:
        """Roll out leases until told to stop, then finish those at hand."""
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(self._receive(parts, tasks)),
                tasks.create_task(parts.weights.run()),
                tasks.create_task(self._send_status(parts)),
                tasks.create_task(self._link.watch()),
            ]
            await self._stopping.wait()
            await self._link.send(self._status())
            await self._leases.finish(DRAIN_TIMEOUT_S)
            for loop in loops:
                loop.cancel()

    # --- loops ----------------------------------------------------------------------------------

    async def _receive(self, parts: Parts, tasks: asyncio.TaskGroup) -> None:
        """Dispatch the learner's messages; nothing here waits for work to be done."""
        while True:
            message, payloads = await self._link.receive()
            match message:
                case Lease():
                    self._leases.begin(message, parts.worker, tasks)
                case Pong():
                    self._session.answered(message)
                case Ack():
                    self._session.acknowledged(message)
                case Weights():
                    parts.weights.announce(message, payloads)
                case WeightsChunk():
                    parts.weights.chunk(message, payloads)
                case Welcome():
                    self._session.joined_again(message)
                    self._leases.cancel()
                    parts.weights.start_over()
                case Drain():
                    self._leases.cancel()
                    self.stop(one_line(message.cause))
                case Error(code="unknown_session"):
                    await self._session.join_again(drop_leases=self._leases.cancel)
                case Error(code="refused"):
                    raise Refused(f"the learner refuses this actor: {one_line(message.message)}")
                case Error():
                    log.warning("the learner: %s", one_line(message.message))

    async def _send_status(self, parts: Parts) -> None:
        """Heartbeat; also sends groups again whose acknowledgement is overdue."""
        while True:
            self._raise_if_hopeless(parts)
            self._sequence += 1
            await self._link.send(self._status())
            await self._session.send_overdue_groups()
            self._heartbeat.beat()
            await asyncio.sleep(parts.config.status_interval_s)

    # --- details --------------------------------------------------------------------------------

    def _raise_if_hopeless(self, parts: Parts) -> None:
        """Raise `PeerLost` or `EngineError` when the learner or the engine is silent too long."""
        if self._link.silence_s > parts.config.learner_timeout_s:
            raise PeerLost(
                f"the learner at {self._options.learner} has been silent for "
                f"{self._link.silence_s:.0f} s; this actor stops"
            )
        parts.engine.raise_if_dead()
        if parts.engine.stalled_s > parts.config.engine_timeout_s:
            raise EngineError(f"the engine has made no progress for {parts.engine.stalled_s:.0f} s")

    def _status(self) -> Status:
        engine = self._parts.engine if self._parts else None
        return Status(
            sequence=self._sequence,
            capacity=self._capacity(),
            version=engine.version if engine else -1,
            loading=self._parts.weights.loading if self._parts else -1,
            leases=(*self._leases.at_hand, *self._session.unacknowledged),
            heard=self._session.heard,
            tokens_generated=engine.stats.tokens_generated if engine else 0,
            groups_generated=self._session.groups_generated,
            idle_seconds=engine.stats.idle_seconds if engine else 0.0,
            stall_seconds=engine.stats.stall_seconds if engine else 0.0,
            uptime_seconds=time.monotonic() - self._started,
        )

    def _capacity(self) -> int:
        """Leases that can be held at once; 0 before there are weights, and while stopping."""
        if not self._ready or self._parts is None or self._stopping.is_set():
            return 0
        config = self._parts.config
        wanted = self._parts.engine.capacity(
            len(self._leases.at_hand), config.sampling.num_rollouts
        )
        return min(wanted, config.max_leases or MAX_LEASES)

    @property
    def _ready(self) -> bool:
        return self._parts is not None and self._parts.engine.version >= 0

    def _serve_metrics(self) -> ObservabilityServer:
        registry = CollectorRegistry()
        registry.register(
            StatusCollector(
                self._status,
                self._leases.failed,
                lambda: dict(self._parts.scorer.failures) if self._parts else {},
                lambda: self._link.dropped_messages,
            )
        )
        return ObservabilityServer(
            registry,
            host=self._options.metrics_host,
            port=self._options.metrics_port,
            heartbeats=(self._heartbeat,),
            ready=lambda: self._ready,
        )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure in nested task groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""The actor process: joins a learner, rolls out leases, follows its weights.

| loop      | consumes        | waits for           | unblocked by      | produces         |
|-----------|-----------------|---------------------|-------------------|------------------|
| receive   | messages        | the learner         | the learner       | tasks, events    |
| roll out  | one lease each  | engine, rewards     | finished requests | one group each   |
| weights   | announcements   | a newer version     | the learner       | `WeightsReady`   |
| heartbeat | -               | its interval        | the clock         | `Status`         |
| watch     | handshakes      | a reconnection      | the learner       | -, or it refuses |

A lease ends in exactly one `GroupHeader` or `Failed`. Groups are kept until they are acknowledged
and sent again if that takes too long; the learner knows a group that it already has.
"""

import asyncio
import logging
import math
import os
import signal
import socket
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import torch
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from transformers import AutoTokenizer

from actors.engines.choice import start_engine
from actors.engines.engine import Engine, UnusableRow
from actors.engines.model_files import write_model_files
from actors.link import HELLO_RETRY_S, LearnerLink
from actors.metrics import StatusCollector
from actors.rewards.functions import DEFAULT_MODULES
from actors.rewards.pool import RewardFailure
from actors.rewards.scorer import RewardScorer
from actors.rollouts.single_turn import RolloutWorker
from actors.weights.receiver import WeightsReceiver
from protocol.config import ActorConfig
from protocol.errors import BadMessage, EngineError, PeerLost, Refused, brief, one_line
from protocol.framing import Buffer
from protocol.groups import pack_group
from protocol.keys import ActorKeys
from protocol.machine import machine_id
from protocol.messages import (
    MAX_LEASES,
    PROTOCOL_VERSION,
    Ack,
    Drain,
    Error,
    Failed,
    Goodbye,
    Header,
    Hello,
    Lease,
    Pong,
    Status,
    Weights,
    WeightsChunk,
    Welcome,
)
from protocol.observability import Heartbeat, ObservabilityServer
from protocol.weights import layout
from transfer.backends import gpu_identity, nccl_available

log = logging.getLogger("actor")

DRAIN_TIMEOUT_S = 5.0
"""With the engine's end and the last messages it makes less than the ten seconds that whoever
stops a process waits before it kills."""
RESEND_AFTER_S = 10.0
MAX_CAUSE = 1000
"""Characters of why a lease failed: a longer message would be refused."""


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """What the command line of an actor says; the rest is in the welcome."""

    learner: str
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    connect_timeout_s: float = 30.0
    keys: ActorKeys | None = None
    """None only for a learner on this machine."""
    allowed_modules: tuple[str, ...] = DEFAULT_MODULES
    folder: Path = field(default_factory=Path.cwd)
    """Reward modules that lie here may be imported too."""


@dataclass(slots=True)
class _Unacknowledged:
    header: Header
    payloads: list[Buffer]
    sent_at: float


class Actor:
    """One inference actor; `run` returns when the run is over or the actor is told to stop."""

    def __init__(self, options: ActorOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._session = uuid.uuid4().hex
        self._started = time.monotonic()
        self._link = LearnerLink(options.learner, self._session, options.keys)
        self._stopping = asyncio.Event()
        self._stop_cause = ""
        self._rollouts: dict[int, asyncio.Task[None]] = {}
        self._unacknowledged: dict[int, _Unacknowledged] = {}
        self._groups_generated = 0
        self._failed: Counter[str] = Counter()
        self._sequence = 0
        self._heard = -1
        self._heartbeat = Heartbeat("loop", limit_s=30.0)
        self._engine: Engine | None = None
        self._scorer: RewardScorer | None = None
        self._rejoining_since = -math.inf
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def stop(self, cause: str) -> None:
        """Finish the leases at hand, say goodbye and return from `run`. Call it on the loop."""
        self._stop_cause = self._stop_cause or cause
        self._stopping.set()

    async def run(self) -> None:
        """Join, work, leave. Raises the errors of `protocol.errors`."""
        registry = CollectorRegistry()
        registry.register(
            StatusCollector(
                self._status,
                self._failed,
                lambda: dict(self._scorer.failures) if self._scorer else {},
                lambda: self._link.dropped_messages,
            )
        )
        server = ObservabilityServer(
            registry,
            host=self._options.metrics_host,
            port=self._options.metrics_port,
            heartbeats=(self._heartbeat,),
            ready=lambda: self._engine is not None and self._engine.version >= 0,
        )
        self._hello = Hello(
            protocol=PROTOCOL_VERSION,
            session=self._session,
            host=socket.gethostname(),
            pid=os.getpid(),
            metrics_host=self._options.metrics_host,
            metrics_port=server.port,
            machine=machine_id(),
            gpu=gpu_identity(self._device) if nccl_available() else "",
        )
        try:
            welcome, files = await self._link.join(self._hello, self._options.connect_timeout_s)
            log.info("joined run %s; metrics on %s", welcome.run_id, server.address)
            await self._work(welcome, files)
        finally:
            self._link.close()
            server.close()

    async def _work(self, welcome: Welcome, files: list[memoryview]) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop, signal.Signals(signum).name)
        goodbye = "error"
        try:
            if not await self._built(welcome, files):
                goodbye = self._stop_cause
                return
            async with asyncio.TaskGroup() as self._tasks:
                loops = [
                    self._tasks.create_task(self._receive()),
                    self._tasks.create_task(self._weights.run()),
                    self._tasks.create_task(self._send_status()),
                    self._tasks.create_task(self._link.watch()),
                ]
                await self._stopping.wait()
                await self._drain()
                for loop_task in loops:
                    loop_task.cancel()
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
            log.info("leaving: %s", goodbye)
            await self._link.send(Goodbye(cause=goodbye))
            if self._scorer is not None:
                await self._scorer.close()
            if self._engine is not None:
                await self._engine.close()

    async def _built(self, welcome: Welcome, files: list[memoryview]) -> bool:
        """Build all parts; False if told to stop meanwhile: engines take up to minutes."""
        # Only while they are read, so that a killed actor leaves no copy behind.
        with tempfile.TemporaryDirectory(prefix="gdpo-actor-") as folder:
            write_model_files(Path(folder), welcome.files, files)
            build = asyncio.create_task(self._build(welcome, Path(folder)))
            stop = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({build, stop}, return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if not build.done():
                build.cancel()
                return False
            build.result()
            return True

    async def _build(self, welcome: Welcome, folder: Path) -> None:
        """Rewards, tokenizer, engine and weights receiver, as the welcome says."""
        try:
            config = ActorConfig.model_validate(welcome.actor)
        except ValidationError as error:
            raise BadMessage(f"the welcome's configuration is invalid: {error}") from error
        try:
            specs = layout(welcome.manifest)
        except ValueError as error:
            raise BadMessage(f"the welcome's weights are invalid: {brief(error)}") from error
        self._config = config
        self._welcome = welcome
        self._scorer = RewardScorer(
            config.rewards,
            allowed_modules=self._options.allowed_modules,
            folder=self._options.folder,
            timeout_s=config.reward_timeout_s,
            processes=config.reward_processes,
        )
        await self._scorer.start()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            # Whatever its parsers raise: the files came from the learner.
            raise BadMessage(f"the welcome brings no tokenizer: {brief(error)}") from error
        engine = await start_engine(folder, config)
        self._worker = RolloutWorker(
            engine,
            tokenizer,
            self._scorer,
            max_prompt_tokens=config.sampling.max_prompt_tokens,
            max_tokens=config.sampling.max_tokens,
        )
        self._weights = WeightsReceiver(
            self._link, engine, specs, config.learner_timeout_s, self._device
        )
        self._engine = engine

    # --- loops ----------------------------------------------------------------------------------

    async def _receive(self) -> None:
        """Dispatch the learner's messages; nothing here waits for work to be done."""
        while True:
            message, payloads = await self._link.receive()
            match message:
                case Lease():
                    self._begin(message)
                case Pong():
                    self._heard = message.sequence
                case Ack():
                    self._unacknowledged.pop(message.lease, None)
                    if message.verdict == "rejected":
                        log.info("lease %d rejected: %s", message.lease, one_line(message.cause))
                case Weights():
                    self._weights.announce(message, payloads)
                case WeightsChunk():
                    self._weights.chunk(message, payloads)
                case Welcome():
                    self._welcome_back(message)
                    self._weights.start_over()
                case Drain():
                    self._cancel_rollouts()
                    self.stop(one_line(message.cause))
                case Error(code="unknown_session"):
                    await self._join_again()
                case Error(code="refused"):
                    raise Refused(f"the learner refuses this actor: {one_line(message.message)}")
                case Error():
                    log.warning("the learner: %s", one_line(message.message))

    def _begin(self, lease: Lease) -> None:
        """Roll out a lease beside the others, unless it is no lease that a learner would issue."""
        if lease.lease in self._rollouts or len(self._rollouts) >= MAX_LEASES:
            log.warning("lease %d is one too many; not taken", lease.lease)
            return
        task = self._tasks.create_task(self._roll_out(lease))
        self._rollouts[lease.lease] = task
        task.add_done_callback(partial(self._forget, lease.lease))

    async def _roll_out(self, lease: Lease) -> None:
        """Generate and score one lease; ends in a group or a failure, never in neither."""
        try:
            async with asyncio.timeout(lease.deadline_s):
                group = await self._worker.roll_out(lease)
        except RewardFailure as error:
            cause = one_line(str(error), MAX_CAUSE)
            await self._give_up(lease, "reward", cause, error.reward)
            return
        except UnusableRow as error:
            await self._give_up(lease, "prompt", one_line(str(error), MAX_CAUSE))
            return
        except EngineError:
            # Engines may get the signal that stops this actor too.
            if self._stopping.is_set():
                return
            raise
        except TimeoutError:
            await self._give_up(lease, "deadline", f"it took longer than {lease.deadline_s:g} s")
            return
        self._groups_generated += 1
        header, payloads = pack_group(group)
        self._unacknowledged[lease.lease] = _Unacknowledged(header, payloads, time.monotonic())
        await self._link.send(header, payloads)

    async def _give_up(
        self,
        lease: Lease,
        kind: Literal["reward", "prompt", "deadline"],
        cause: str,
        reward: str = "",
    ) -> None:
        self._failed[kind] += 1
        log.warning("lease %d (%s) failed: %s", lease.lease, lease.prompt_id, cause)
        await self._link.send(Failed(lease=lease.lease, kind=kind, cause=cause, reward=reward))

    async def _send_status(self) -> None:
        """Heartbeat; also sends groups again whose acknowledgement is overdue."""
        while True:
            if self._link.silence_s > self._config.learner_timeout_s:
                raise PeerLost(
                    f"the learner at {self._options.learner} has been silent for "
                    f"{self._link.silence_s:.0f} s; this actor stops"
                )
            if self._engine:
                self._engine.raise_if_dead()
            if self._engine and self._engine.stalled_s > self._config.engine_timeout_s:
                raise EngineError(
                    f"the engine has made no progress for {self._engine.stalled_s:.0f} s"
                )
            self._sequence += 1
            await self._link.send(self._status())
            now = time.monotonic()
            for message in self._unacknowledged.values():
                if now - message.sent_at > RESEND_AFTER_S:
                    message.sent_at = now
                    await self._link.send(message.header, message.payloads)
            self._heartbeat.beat()
            await asyncio.sleep(self._config.status_interval_s)

    async def _drain(self) -> None:
        """Finish the leases at hand, within `DRAIN_TIMEOUT_S`; the learner reissues the rest."""
        await self._link.send(self._status())
        if self._rollouts:
            log.info("finishing %d leases", len(self._rollouts))
            await asyncio.wait(list(self._rollouts.values()), timeout=DRAIN_TIMEOUT_S)
        self._cancel_rollouts()

    def _cancel_rollouts(self) -> None:
        for task in list(self._rollouts.values()):
            task.cancel()

    def _forget(self, lease: int, _: asyncio.Task[None]) -> None:
        del self._rollouts[lease]

    # --- details --------------------------------------------------------------------------------

    def _status(self) -> Status:
        engine = self._engine
        ready = engine if engine and engine.version >= 0 and not self._stopping.is_set() else None
        return Status(
            sequence=self._sequence,
            capacity=self._capacity(ready) if ready else 0,
            version=engine.version if engine else -1,
            leases=(*self._rollouts, *self._unacknowledged),
            heard=self._heard,
            tokens_generated=engine.stats.tokens_generated if engine else 0,
            groups_generated=self._groups_generated,
            idle_seconds=engine.stats.idle_seconds if engine else 0.0,
            stall_seconds=engine.stats.stall_seconds if engine else 0.0,
            uptime_seconds=time.monotonic() - self._started,
        )

    def _capacity(self, engine: Engine) -> int:
        wanted = engine.capacity(len(self._rollouts), self._config.sampling.num_rollouts)
        return min(wanted, self._config.max_leases or MAX_LEASES)

    async def _join_again(self) -> None:
        """The learner gave us up during a silence: our leases are with others, so drop them."""
        if self._clock() - self._rejoining_since < HELLO_RETRY_S:
            # It answers so to each of the messages that were on their way.
            return
        self._rejoining_since = self._clock()
        self._let_go()
        await self._link.send(
            msgspec.structs.replace(
                self._hello,
                run_id=self._welcome.run_id,
                model_digest=self._welcome.model_digest,
            )
        )

    def _let_go(self) -> None:
        """Of what belongs to the session before."""
        self._cancel_rollouts()
        self._unacknowledged.clear()
        self._heard = -1

    def _welcome_back(self, welcome: Welcome) -> None:
        if welcome.run_id != self._welcome.run_id:
            raise Refused(
                f"the learner now runs {welcome.run_id}, this actor was built for "
                f"{self._welcome.run_id}; start it again"
            )
        self._rejoining_since = -math.inf
        self._let_go()
        log.info("joined again after a silence")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure in nested task groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

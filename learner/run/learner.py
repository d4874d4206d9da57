"""The learner process.

     actors ──groups──► intake ──► replay buffer ──► trainer ──snapshot──► publisher ──► actors
        ▲                  │                            │
        └──────leases──────┘◄───────room in the buffer──┘

| loop       | consumes        | waits for              | unblocked by       | produces         |
|------------|-----------------|------------------------|--------------------|------------------|
| intake     | messages, ticks | nothing                | -                  | groups, leases   |
| trainer    | batches         | enough fresh groups    | intake             | a new version    |
| publisher  | newest version  | actors, with deadlines | actors, the clock  | fresh actors     |

The trainer runs on the main thread; the others on one thread each.
"""

import logging
import math
import socket
import time
from pathlib import Path
from typing import Any

import torch
import zmq
from prometheus_client import CollectorRegistry

from learner.config.run import RunConfig
from learner.coordinator.access import Access
from learner.coordinator.admission import Greeting
from learner.coordinator.coordinator import Coordinator
from learner.coordinator.intake import Intake
from learner.coordinator.self_check import SelfCheck
from learner.phases import Phases
from learner.prompts.rows import load_rows
from learner.prompts.stream import PromptStream, check_work, evaluation_work
from learner.prompts.work_queue import WorkQueue, group_limits
from learner.records import Control, Endpoints, EvaluationResult, Summary
from learner.recovery.checkpoints import Checkpoint, newest
from learner.recovery.history import History
from learner.recovery.resume import Resumed, load_trainer
from learner.replay.buffer import ReplayBuffer, TrainingBatch
from learner.run.metrics import StateCollector, StepMetrics
from learner.run.progress import Progress
from learner.run.reports import (
    evaluation_report,
    status_report,
    step_report,
    summary_report,
    weights_report,
)
from learner.run.throughput import Progress as Throughput
from learner.run_folder import RunFolder
from learner.state import RunState
from learner.status import Status
from learner.training.reward_settings import RewardSchedule, RewardSetting
from learner.training.trainer import StepResult
from learner.weights.chunks import ChunkSource
from learner.weights.pack import MemoryPool, pack
from learner.weights.publisher import Publisher
from learner.weights.push_metrics import PushMetrics
from learner.weights.routes import topology_of
from learner.weights.snapshots import Snapshot, SnapshotStore
from learner.weights.stream import WeightsStream
from protocol.errors import ConfigError, TrainingError, brief
from protocol.keys import AllowList
from protocol.messages import Welcome
from protocol.observability import Heartbeat, ObservabilityServer
from protocol.sockets import bind_learner, is_wildcard, parse_tcp
from protocol.weights import item_bytes, total_bytes

log = logging.getLogger("learner")

DRAIN_TIMEOUT_S = 3.0
"""For the actors' goodbyes: they drop what they are at, so that only a hung one takes longer."""
STOP_CHECK_S = 0.5
CHECK_ROWS = 64
"""Rows that new actors are checked with, in turn: one of them may be unusable."""


class Learner:
    """One training run; `run` returns when it is done or `stop` was called."""

    def __init__(self, config: RunConfig, folder: RunFolder, *, resume: bool = False) -> None:
        """``resume`` goes on where the learner before in this folder ended, or was killed."""
        self.config = config
        self.folder = folder
        self.state = Progress()
        self._registry = CollectorRegistry()
        self.phases = Phases(self._registry)
        if config.training.threads:
            torch.set_num_threads(config.training.threads)
        folder.take()
        checkpoint = newest(folder.checkpoints) if resume else None
        self._load(checkpoint)
        self._assemble()
        if resume:
            self._resume(checkpoint)
        folder.go_on(config)
        self._connect()

    def _load(self, checkpoint: Checkpoint | None) -> None:
        """Model and data: everything that the user may have got wrong, before a port opens."""
        config = self.config
        self._keys = config.load_keys()
        rows = load_rows(config.data.train, config.data.train_split)
        self._heldout = (
            load_rows(config.data.heldout, config.data.heldout_split) if config.data.heldout else []
        )
        self._stream = PromptStream(rows, config)
        self._heartbeat = Heartbeat("trainer", limit_s=120.0)
        self.policy, self.trainer = load_trainer(config, checkpoint, self._heartbeat.beat)
        self._topology = topology_of(config, next(self.policy.model.parameters()).device)
        self.rewards = RewardSchedule(config.rewards, config.training.steps)
        self.history = History(self.folder, config, self.policy, self.phases)
        self.buffer = ReplayBuffer.of(config)

    def _assemble(self) -> None:
        """The parts that decide, still without a connection to anybody."""
        config = self.config
        checks = [check_work(row, config) for row in self._stream.rows[:CHECK_ROWS]]
        self._self_check = (
            SelfCheck(self.policy, config, checks) if config.admission.self_check else None
        )
        self._memory = MemoryPool(
            total_bytes(self.policy.specs),
            pinned=any(parameter.is_cuda for parameter in self.policy.model.parameters()),
        )
        self._snapshots = SnapshotStore(self._packed())
        self.weights_stream = WeightsStream(
            ChunkSource(
                self._snapshots,
                width=item_bytes(self.policy.specs),
                compress=config.weights.compress,
            )
        )
        self._work = WorkQueue(self._stream)
        self._pacing = config.pacing()
        self.coordinator = Coordinator(
            config,
            greeting=Greeting(
                Welcome(
                    run_id=self.folder.run_id,
                    actor=config.for_actors().model_dump(mode="json"),
                    model_digest=self.policy.files_digest,
                    files=tuple(self.policy.files),
                    manifest=self.policy.manifest,
                ),
                tuple(self.policy.files.values()),
            ),
            work=self._work,
            buffer=self.buffer,
            pacing=self._pacing,
            snapshots=self._snapshots,
            vocab_size=self.policy.vocab_size,
            phases=self.phases,
            journal=self.history.journal,
            clock=time.monotonic,
            on_pull=self.weights_stream.pull,
            self_check=self._self_check,
        )
        self.progress = Throughput(self.coordinator, config.training.batch_groups)

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        """Be as the learner before was after the last batch that it began, and go on from there."""
        limits = group_limits(self.config, self.policy.vocab_size)
        resumed = Resumed(self.config, checkpoint, self.history.journal, limits)
        self.state.before = self.folder.read_evaluation()
        self.history.checkpoints.put_aside_after(resumed.version)
        self.folder.forget_steps_after(resumed.version)
        log.info("resuming %s from step %d", self.folder.path, resumed.version)
        if checkpoint is not None:
            state = checkpoint.state
            self.state.training_seconds = state.training_seconds
            self.state.lag0_difference = state.lag0_difference
            self.progress.tokens_trained = state.tokens_trained
            self.progress.tokens_generated_before = state.tokens_generated
            self.coordinator.counters.restore(state.counters)
        resumed.replay(self.buffer, self.rewards, self._train_again, self.history.note_finished)
        resumed.restore_work(self._stream, self._work, self.coordinator.leases, self.buffer)
        self.coordinator.advance(self.trainer.version)
        if self.trainer.version > resumed.version:
            self._snapshots.publish(self._packed())
            self.coordinator.count_as_pushed()

    def _train_again(self, cut: TrainingBatch, setting: RewardSetting) -> None:
        started = time.monotonic()
        step = self.trainer.step(cut.groups, setting)
        self.state.training_seconds += time.monotonic() - started
        self._note(step)
        self._append(step, time.monotonic() - started)

    def _connect(self) -> None:
        """Open the ports and start the threads; from here on actors may join."""
        config = self.config
        self._context: zmq.Context[Any] = zmq.Context()
        # The largest frame of a group is its version spans: at most one triple a token.
        tokens = config.sampling.max_tokens * max(
            config.sampling.num_rollouts, config.eval.num_rollouts
        )
        sockets = bind_learner(
            self._context, config.endpoints.bind, max(1 << 20, 12 * tokens), self._keys
        )
        self.url = self._reachable(sockets.url, "127.0.0.1")
        """For actors on this machine."""
        self.join_url = self._reachable(sockets.url, socket.gethostname())
        """For all others too."""
        allowed = AllowList(Path(config.keys.allowed)) if config.keys.allowed else None
        if self._keys is not None and allowed is not None:
            self.folder.write_learner_key(self._keys.public)
            log.info(
                "encrypted, with the key %s; %d keys may connect", self._keys.public, len(allowed)
            )
        self.access = Access(sockets, allowed)
        intake_heartbeat = Heartbeat("intake", limit_s=10.0)
        self._intake = Intake(sockets, self.access, self.coordinator, intake_heartbeat)
        if journal := self.history.journal:
            journal.start(self.coordinator.stored, self.coordinator.fail)
            self.rewards.record = self.history.record_command
        if self._self_check is not None:
            self._self_check.start(self.coordinator.fail)
        self.weights_stream.start(self.coordinator.answer_pull, self.coordinator.fail)
        self.publisher = Publisher(
            self.coordinator,
            self._snapshots,
            self.weights_stream,
            config.weights,
            self._topology,
            config.collective_address,
            PushMetrics(self._registry, self.phases),
            self.coordinator.fail,
        )
        self._registry.register(
            StateCollector(
                self.coordinator,
                self.access,
                self.buffer,
                self.progress,
                self.history.journal,
                self.weights_stream,
            )
        )
        self._metrics = StepMetrics(self._registry)
        self._server = ObservabilityServer(
            self._registry,
            host=config.endpoints.metrics_host,
            port=config.endpoints.metrics_port,
            heartbeats=(self._heartbeat, intake_heartbeat),
            ready=lambda: self.state.phase != "loading",
            routes={"/status": lambda: self.status().model_dump(), "/sd": self._service_discovery},
            commands={"/rewards": self._change_rewards},
        )
        self.metrics_url = f"http://{self._server.address}/metrics"
        self.folder.write_control(Control(url=self._server.command_url, token=self._server.token))
        self.folder.write_endpoints(Endpoints(learner=self.url, metrics=self.metrics_url))

    def _reachable(self, bound: str, host_of_all: str) -> str:
        """``bound``, with a host that actors can connect to in the place of a wildcard."""
        host, port = parse_tcp(bound)
        if not is_wildcard(host):
            return bound
        return f"tcp://{self.config.collective_address or host_of_all}:{port}"

    # --- the run --------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Evaluate, train, evaluate, save; returns the summary.

        A stop request ends training after the step at hand, skips the evaluation and still saves.
        Raises what made going on impossible, a `TrainingError` above all; the summary is written
        even then, and a checkpoint too, unless it was a step that failed.
        """
        failure: Exception | None = None
        try:
            if self.state.before is None and self.trainer.version == 0:
                self.state.before = self._evaluate("evaluating before")
                if self.state.before and not self.state.interrupted:
                    self.folder.write_evaluation(self.state.before)
            self._train()
            self._save()
            self.state.after = self._evaluate("evaluating after")
            self.state.completed = not self.state.interrupted
        except Exception as error:
            failure = error
            self.state.interrupted = brief(error)
        try:
            self.state.phase = "saving"
            self._save()
        except Exception as error:
            failure = failure or error
            self.state.completed = False
            self.state.interrupted = self.state.interrupted or brief(error)
        self._leave()
        # Nothing changes the books any more.
        self._intake.close()
        self.history.close()
        summary = self._summary()
        try:
            self.folder.write_summary(summary)
        except TrainingError as error:
            failure = failure or error
        if failure is not None:
            raise failure
        return summary

    def stop(self, cause: str) -> None:
        """End after the step at hand; callable from a signal handler."""
        self.state.stop(cause)

    def close(self) -> None:
        """Threads and ports; after `run`."""
        self.publisher.close()
        self.weights_stream.close()
        self._intake.close()
        self.history.close()
        if self._self_check is not None:
            self._self_check.close()
        self._server.close()
        self._context.term()
        self.folder.close()

    def _train(self) -> None:
        self.state.phase = "training"
        started = time.monotonic() - self.state.training_seconds
        self.progress.restart()
        self.coordinator.open_training()
        while self.trainer.version < self.config.training.steps:
            cut = self._next_batch()
            if cut is None:
                break
            step_started = time.monotonic()
            # In this order: a command for the batch after it is in the journal behind it.
            self.history.begin(self.trainer.version + 1, cut)
            setting = self.rewards.begin(self.trainer.version + 1)
            step = self.trainer.step(cut.groups, setting)
            # Nobody may see a version that a resumed run would not make again.
            self.history.wait()
            self.coordinator.advance(step.version)
            if self._pacing.is_pushed(step.version):
                self._publish()
            self.state.training_seconds = time.monotonic() - started
            self._record(step, time.monotonic() - step_started)
            if self.history.is_due(step.version):
                self._checkpoint_now()
            self._pause()
        self.state.training_seconds = time.monotonic() - started
        self.coordinator.close_training()

    def _checkpoint_now(self) -> None:
        self.history.checkpoint(self._state(), self.trainer.state_tensors())

    def _save(self) -> None:
        """The checkpoint of the last step, complete; none if there is no step, or half of one."""
        checkpoints = self.history.checkpoints
        version = self.trainer.version
        try:
            checkpoints.finish()
            if version and not self.trainer.in_step and version not in checkpoints.versions:
                # With a checkpoint of a batch that is not in the journal, a resumed run would train
                # on its groups again.
                self.history.wait()
                self._checkpoint_now()
                checkpoints.finish()
        finally:
            if versions := checkpoints.versions:
                self.folder.show_checkpoint(checkpoints.path(versions[-1]) / "model")

    def _state(self) -> RunState:
        prompts, leases = self.coordinator.state()
        trainer, setting = self.trainer, self.trainer.batch_std_setting
        return RunState(
            run_id=self.folder.run_id,
            version=trainer.version,
            prompts=prompts,
            next_lease=self.coordinator.leases.next_lease,
            leases=leases,
            groups=self.buffer.state(),
            rewards=self.rewards.state(),
            batch_std=trainer.batch_std,
            batch_std_setting=setting.as_json() if setting else None,
            tokens_trained=self.progress.tokens_trained,
            tokens_generated=self.progress.tokens_generated,
            training_seconds=self.state.training_seconds,
            lag0_difference=self.state.lag0_difference,
            counters=self.coordinator.counters.totals(),
        )

    def _packed(self) -> Snapshot:
        """The weights of the trainer's version."""
        return pack(self.trainer.version, self.policy.model, self.policy.specs, self._memory)

    def _publish(self) -> None:
        started = time.monotonic()
        snapshot = self._packed()
        self.publisher.publish(snapshot, time.monotonic() - started)

    def _next_batch(self) -> TrainingBatch | None:
        """Wait for a batch; None if the run is to stop. Raises what ends the run."""
        last_group_at = time.monotonic()
        accepted = self.buffer.books.accepted
        config, deadlines = self.config.training, self.config.deadlines
        patience_s = deadlines.lease_timeout_s + deadlines.wait_for_actors_s
        with self.progress.waiting():
            while not self.state.interrupted:
                self.coordinator.raise_if_failed()
                if self.buffer.books.accepted > accepted:
                    last_group_at, accepted = time.monotonic(), self.buffer.books.accepted
                if time.monotonic() - last_group_at > patience_s:
                    raise TrainingError(
                        f"no group came in for {patience_s:.0f} s, though "
                        f"{self.coordinator.num_live} actors are connected; look into their logs"
                    )
                self._heartbeat.beat()
                cut = self.buffer.take(
                    config.batch_groups,
                    self.trainer.version,
                    STOP_CHECK_S,
                    batches_after=config.steps - self.trainer.version - 1,
                )
                # Room in the buffer.
                self.coordinator.issue()
                if cut is not None:
                    return cut
            return None

    def _evaluate(self, phase: str) -> EvaluationResult | None:
        """Roll the held-out prompts out under the current version; None if stopped or no data.

        Actors get this version: it is the first one, the last one, or where a resume led to.
        """
        if not self._heldout or self.state.interrupted:
            return None
        self.state.phase = phase
        version = self.trainer.version
        works = evaluation_work(self._heldout, self.config, version)
        evaluation = self.coordinator.start_evaluation(works, version)
        deadline = math.inf
        while not evaluation.done.wait(STOP_CHECK_S):
            self.coordinator.raise_if_failed()
            self._heartbeat.beat()
            if self.state.interrupted:
                return None
            # The time runs while there is somebody to evaluate.
            if not self.coordinator.ready_actors():
                deadline = math.inf
            elif deadline == math.inf:
                deadline = time.monotonic() + self.config.eval.timeout_s
            if time.monotonic() > deadline:
                log.warning(
                    "evaluation ended after eval.timeout_s = %g with %d of %d prompts",
                    self.config.eval.timeout_s,
                    evaluation.num_prompts,
                    len(works),
                )
                break
        self.coordinator.end_evaluation()
        return evaluation_report(evaluation, tuple(r.name for r in self.config.rewards))

    def _record(self, step: StepResult, seconds: float) -> None:
        self._note(step)
        self.progress.sample()
        self._metrics.step(step, seconds)
        self._append(step, seconds)

    def status(self) -> Status:
        """The state of the run now; callable from any thread."""
        return status_report(
            self.config,
            self.folder,
            self.state,
            version=self.trainer.version,
            buffer=self.buffer,
            coordinator=self.coordinator,
            throughput=self.progress,
            access=self.access,
            weights=weights_report(
                self.policy.specs,
                self.config.weights.push_every,
                self.publisher,
                self.weights_stream,
            ),
        )

    def _summary(self) -> Summary:
        return summary_report(
            self.config,
            self.folder,
            self.state,
            version=self.trainer.version,
            phase_seconds=self.phases.mean_seconds,
            rewards=self.rewards,
            buffer=self.buffer,
            coordinator=self.coordinator,
            throughput=self.progress,
            access=self.access,
            publisher=self.publisher,
            weights_stream=self.weights_stream,
        )

    def _append(self, step: StepResult, seconds: float) -> None:
        self.folder.append_step(
            step_report(
                step,
                seconds,
                training_seconds=self.state.training_seconds,
                rates=self.progress.rates,
                buffer=self.buffer,
                actors_live=self.coordinator.num_live,
            )
        )

    def _note(self, step: StepResult) -> None:
        self.state.note(step)
        self.progress.tokens_trained += step.num_tokens
        self.progress.steps = step.version

    def _pause(self) -> None:
        deadline = time.monotonic() + self.config.training.pause_per_step_s
        while not self.state.interrupted and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, STOP_CHECK_S))

    def _leave(self) -> None:
        """Let the actors go."""
        self.state.phase = "leaving"
        self.coordinator.drain(self.state.interrupted or "the run is complete")
        if not self.coordinator.wait_until_empty(DRAIN_TIMEOUT_S):
            log.warning("%d actors did not say goodbye", self.coordinator.num_live)

    def _change_rewards(self, updates: Any) -> dict[str, Any]:
        """A command from outside, on a thread of the server."""
        if self.state.interrupted:
            raise ConfigError(f"the run is ending: {self.state.interrupted}")
        return self.rewards.command(updates)

    def _service_discovery(self) -> list[dict[str, Any]]:
        """Prometheus HTTP service discovery: the live actors' metrics endpoints."""
        return [
            {
                "targets": [f"{actor.hello.metrics_host}:{actor.hello.metrics_port}"],
                "labels": {"actor": str(actor.number), "run": self.folder.path.name},
            }
            for actor in self.coordinator.actors()
            if actor.hello.metrics_port
        ]

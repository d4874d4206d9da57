"""The learner process.

     actors ──groups──► intake ──► replay buffer ──► trainer ──snapshot──► publisher ──► actors
        ▲                  │                            │
        └──────leases──────┘◄───────room in the buffer──┘

Every loop has a thread of its own:

| loop       | thread         | consumes     | waits for       | unblocked by     | produces       |
|------------|----------------|--------------|-----------------|------------------|----------------|
| training   | MainThread     | batches      | fresh groups    | intake, journal  | versions       |
| intake     | intake         | messages     | a tick at most  | actors, a wake   | groups, leases |
| journal    | journal        | records      | a record        | any other thread | stored records |
| stream     | weights-stream | pulls        | pulls, versions | intake, pushes   | chunks         |
| publisher  | publisher      | versions     | actors' answers | intake, clock    | actors in step |
| checkpoint | checkpoint     | copies       | a copy          | training         | checkpoints    |
| reading    | completions    | batches      | a batch         | training         | texts in files |
| self-check | self-check     | some groups  | such a group    | intake           | verdicts       |
| pages      | http           | requests     | a request       | clients          | pages          |
| ranks      | pulse          | other pulses | a second        | the clock        | lost ranks     |
| broadcast  | broadcast      | one version  | its members     | members, clock   | sent buckets   |
| call       | collective     | one call     | its peers       | peers            | its result     |
| abort      | nccl-abort     | one epoch    | CUDA kernels    | CUDA             | freed memory   |

That of ranks is there if torchrun started several. The last three live as long as the one thing
that they were made for. A call is one to torch.distributed with a deadline, after which nobody
waits for its thread any more. Every HTTP request has a thread besides, which Python names.
"""

import logging

from learner.config.run import RunConfig
from learner.records import Summary
from learner.recovery.checkpoints import newest
from learner.run.connections import connect
from learner.run.endpoints import EndpointServer
from learner.run.evaluations import Evaluations
from learner.run.loop import TrainingLoop
from learner.run.parts import assemble, load
from learner.run.reports import status_report, summary_report
from learner.run.resumption import resume as resume_run
from learner.run.saving import save
from learner.run_folder import RunFolder
from learner.status import Status
from learner.training.ranks import ALONE, Ranks
from protocol.errors import TrainingError, brief

log = logging.getLogger("learner")

DRAIN_TIMEOUT_S = 3.0
"""Seconds for the actors' goodbyes: they drop what they are at; only a hung one is slow."""


class Learner:
    """One training run; `run` returns when it is done or `stop` was called."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, *, resume: bool = False, ranks: Ranks = ALONE
    ) -> None:
        """Build everything and open the ports; raises `ConfigError`.

        ``resume`` continues where the learner before in this folder ended, or was killed. The other
        ``ranks``, if any, follow this one.
        """
        folder.claim()
        checkpoint = newest(folder.checkpoints) if resume else None
        self.parts = assemble(load(config, folder, checkpoint, ranks))
        ranks.doctor.when_lost(self.parts.coordinator.fail)
        self.parts.completions.start()
        if resume:
            resume_run(self.parts, checkpoint)
        folder.go_on(config)
        self.connections = connect(self.parts)
        self.endpoints = EndpointServer(self.parts, self.connections)
        self._evaluations = Evaluations(self.parts)
        self._loop = TrainingLoop(self.parts, self.connections.publisher, self._evaluations)

    def run(self) -> Summary:
        """Evaluate, train, evaluate, save; returns the summary.

        A stop request ends training after the step at hand, skips the evaluation and still saves.
        Raises what made it impossible to continue, a `TrainingError` above all; the summary is
        written even then, and a checkpoint too, unless it was a step that failed.
        """
        progress, failure = self.parts.progress, None
        try:
            self._train_and_evaluate()
        except Exception as error:
            failure = error
            progress.interrupted = brief(error)
        try:
            progress.phase = "saving"
            save(self.parts)
        except Exception as error:
            failure = failure or error
            progress.completed = False
            progress.stop(brief(error))
        if self.parts.trainer.ranks.are_whole:
            self._leave()
        else:
            log.info("actors are not sent away: they wait for the learner to be resumed")
        # Nothing changes the books any more.
        self.connections.intake.close()
        self.parts.history.close()
        self.parts.completions.close()
        summary = summary_report(self.parts, self.connections)
        try:
            self.parts.folder.write_summary(summary)
        except TrainingError as error:
            failure = failure or error
        if failure is not None:
            raise failure
        return summary

    def status(self) -> Status:
        """The state of the run now, for displays; callable from any thread."""
        return status_report(self.parts, self.connections)

    def stop(self, cause: str) -> None:
        """End after the step at hand; callable from a signal handler."""
        self.parts.progress.stop(cause)

    def close(self) -> None:
        """Close threads and ports; to be called after `run`."""
        self.connections.publisher.close()
        self.parts.weights_stream.close()
        self.connections.intake.close()
        self.parts.history.close()
        self.parts.completions.close()
        if self.parts.self_check is not None:
            self.parts.self_check.close()
        self.endpoints.close()
        self.connections.context.term()
        self.parts.trainer.ranks.dismiss()
        self.parts.folder.close()

    def _train_and_evaluate(self) -> None:
        self._evaluations.before()
        self._loop.run()
        save(self.parts)
        self._evaluations.after()
        self.parts.progress.completed = not self.parts.progress.interrupted

    def _leave(self) -> None:
        """Let the actors go."""
        coordinator, progress = self.parts.coordinator, self.parts.progress
        progress.phase = "leaving"
        coordinator.drain(progress.interrupted or "the run is complete")
        if not coordinator.wait_until_empty(DRAIN_TIMEOUT_S):
            log.warning("%d actors did not say goodbye", coordinator.num_live)

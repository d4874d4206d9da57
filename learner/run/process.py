"""Running a learner in this process, from a configuration to an exit code."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from learner.config.run import RunConfig
from learner.records import Summary
from learner.run.learner import Learner
from learner.run.torchrun import joined
from learner.run_folder import RunFolder
from protocol.errors import ConfigError

log = logging.getLogger("learner")


def run_learner(
    config: RunConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    on_start: Callable[[Learner], None] = lambda _: None,
) -> Summary:
    """Train until done, or until SIGTERM or SIGINT; returns the summary.

    Under torchrun this is rank 0. ``resume`` continues the run of ``folder``. ``on_start`` is
    called once, when actors can join. Raises the errors of `protocol.errors`.
    """
    with _started(config, folder, resume) as learner, _stopped_by_signals(learner):
        keys = " --key ACTOR.key_secret --learner-key LEARNER.key" if config.keys.secret else ""
        log.info("actors join with: gdpo actor --learner %s%s", learner.connections.join_url, keys)
        log.info("metrics: %s", learner.endpoints.metrics_url)
        log.info("run folder: %s", folder.path)
        on_start(learner)
        return learner.run()


@contextmanager
def _started(config: RunConfig, folder: RunFolder, resume: bool) -> Iterator[Learner]:
    """A learner, closed in the end; one that could not be made leaves no new folder behind."""
    with ExitStack() as stack:
        try:
            ranks = stack.enter_context(joined(config))
            learner = Learner(config, folder, resume=resume, ranks=ranks)
        except ConfigError:
            if folder.is_new:
                folder.discard()
            raise
        stack.callback(learner.close)
        yield learner


@contextmanager
def _stopped_by_signals(learner: Learner) -> Iterator[None]:
    """The first signal ends the run in order; the second one has its usual effect."""
    previous: dict[int, Any] = {}

    def stop(signum: int, _: Any) -> None:
        name = signal.Signals(signum).name
        log.info("%s: stopping after the step at hand", name)
        learner.stop(name)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGTERM, signal.SIGINT):
        previous[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

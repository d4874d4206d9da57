"""Running a learner in this process, from a configuration to an exit code."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from learner.config.run import RunConfig
from learner.records import Summary
from learner.run.learner import Learner
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

    ``resume`` continues the run of ``folder``. ``on_start`` is called once, when actors can
    join. Raises the errors of `protocol.errors`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the learner is one process; start it with --nproc-per-node=1")
    try:
        learner = Learner(config, folder, resume=resume)
    except ConfigError:
        if folder.is_new:
            folder.discard()
        raise
    try:
        with _stopped_by_signals(learner):
            keys = " --key ACTOR.key_secret --learner-key LEARNER.key" if config.keys.secret else ""
            log.info(
                "actors join with: gdpo actor --learner %s%s", learner.connections.join_url, keys
            )
            log.info("metrics: %s", learner.endpoints.metrics_url)
            log.info("run folder: %s", folder.path)
            on_start(learner)
            return learner.run()
    finally:
        learner.close()


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

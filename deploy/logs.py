"""Logging of a learner or an actor that runs as a command."""

import logging
import sys
from typing import Any


class _CurrentStderr(logging.StreamHandler[Any]):
    """Writes to sys.stderr as it is at the moment: the live display puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_logging() -> None:
    """Print what learner and actor report, and warnings of everybody else, on standard error."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[_CurrentStderr()],
    )
    for name in ("actor", "learner"):
        logging.getLogger(name).setLevel(logging.INFO)

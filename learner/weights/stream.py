"""The thread that answers pulls: neither training nor the socket waits for an encoder.

Sessions take turns, chunk by chunk. What is left of its time goes into differences that are going
to be asked for.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Condition, Thread

from learner.weights.chunks import Answer, ChunkSource
from learner.weights.snapshots import Snapshot
from protocol.errors import AsyncGdpoError, TrainingError
from protocol.messages import WeightsPull

log = logging.getLogger("learner")

CLOSE_TIMEOUT_S = 1.0
MAX_WAITING = 64
"""Pulls of one session; what is more is dropped, and asked for again."""


class WeightsStream:
    """Serves chunks from `start` until `close`."""

    def __init__(self, source: ChunkSource) -> None:
        self._source = source
        self._changed = Condition()
        self._waiting: OrderedDict[str, deque[WeightsPull]] = OrderedDict()
        self._has_work = False
        """Whether there may be differences to make."""
        self._closing = False
        self._started_at = time.monotonic()
        self.busy_seconds = 0.0
        """Processor time of the thread."""
        self.sent_bytes = 0
        self.plain_bytes = 0
        """Weights that what was sent stands for."""

    def start(
        self, answer: Callable[[str, Answer], None], fail: Callable[[AsyncGdpoError], None]
    ) -> None:
        """``answer(session, ...)`` is called for every pull, on a thread of this object."""
        self._answer = answer
        self._fail = fail
        self._thread = Thread(target=self._run, name="weights-stream", daemon=True)
        self._thread.start()

    @property
    def share(self) -> float:
        """Of the time since the start, that the processor was busy for it."""
        return self.busy_seconds / max(time.monotonic() - self._started_at, 1e-9)

    def pull(self, session: str, pull: WeightsPull) -> None:
        """Answer a pull soon; callable from any thread."""
        with self._changed:
            waiting = self._waiting.setdefault(session, deque())
            if len(waiting) < MAX_WAITING:
                waiting.append(pull)
            self._changed.notify_all()

    def keep_differences(self, previous: Snapshot, new: Snapshot) -> None:
        """See `ChunkSource.keep_differences`."""
        self._source.keep_differences(previous, new)
        with self._changed:
            self._has_work = True
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception as error:
            log.exception("weights stream died")
            self._fail(TrainingError(f"weights stream died: {error}"))

    def _turn(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._has_work or self._closing)
            pulled = self._next()
            self._has_work = self._has_work and pulled is not None
        if pulled is not None:
            session, pull = pulled
            answer = self._source.answer(pull)
            self._answer(session, answer)
            self.sent_bytes += sum(memoryview(payload).nbytes for payload in answer.payloads)
            self.plain_bytes += answer.plain_bytes
        elif self._source.work():
            with self._changed:
                self._has_work = True
        self.busy_seconds = time.thread_time()

    def _next(self) -> tuple[str, WeightsPull] | None:
        """The next pull, of each session in turn."""
        if not self._waiting:
            return None
        session, waiting = self._waiting.popitem(last=False)
        pull = waiting.popleft()
        if waiting:
            self._waiting[session] = waiting
        return session, pull

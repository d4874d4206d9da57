"""The thread that answers pulls: neither training nor the socket waits for an encoder.

Sessions take turns, chunk by chunk. What is left of its time goes into differences that are going
to be asked for.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Literal

from learner.threads import Fail, Worker
from learner.weights.chunks import Answer, ChunkSource
from learner.weights.snapshots import Snapshot
from protocol.messages import WeightsPull

CLOSE_TIMEOUT_S = 1.0
MAX_WAITING = 64
"""Pulls of one session; what is more is dropped, and asked for again."""

_Item = tuple[str, WeightsPull] | Literal["differences"]


class WeightsStream:
    """Serves chunks from `start` until `close`."""

    def __init__(self, source: ChunkSource) -> None:
        self._source = source
        self._waiting: OrderedDict[str, deque[WeightsPull]] = OrderedDict()
        self._has_work = False
        """Whether there may be differences to make."""
        self._started_at = time.monotonic()
        self._worker: Worker[_Item] = Worker(
            "weights-stream", self._take, self._serve, drains=False
        )
        self.busy_seconds = 0.0
        """Processor time of the thread."""
        self.sent_bytes = 0
        self.plain_bytes = 0
        """Weights that what was sent stands for."""

    def start(self, answer: Callable[[str, Answer], None], fail: Fail) -> None:
        """Call ``answer(session, ...)`` for every pull from now on, on a thread of this object.

        ``fail`` is called on it with what ends it.
        """
        self._answer = answer
        self._worker.start(fail)

    @property
    def share(self) -> float:
        """Share of the time since the start that the processor was busy for it."""
        return self.busy_seconds / max(time.monotonic() - self._started_at, 1e-9)

    def pull(self, session: str, pull: WeightsPull) -> None:
        """Answer a pull soon; callable from any thread."""
        with self._worker.adding():
            waiting = self._waiting.setdefault(session, deque())
            if len(waiting) < MAX_WAITING:
                waiting.append(pull)

    def keep_differences(self, previous: Snapshot, new: Snapshot) -> None:
        """Make the differences between two snapshots in the time that is left.

        See `ChunkSource.keep_differences`.
        """
        self._source.keep_differences(previous, new)
        with self._worker.adding():
            self._has_work = True

    def close(self) -> None:
        """End after the answer at hand, or without it when it takes long."""
        self._worker.close(CLOSE_TIMEOUT_S)

    def _take(self) -> _Item | None:
        """Return the next pull, of each session in turn, or else what there is to prepare."""
        if not self._waiting:
            has_work, self._has_work = self._has_work, False
            return "differences" if has_work else None
        session, waiting = self._waiting.popitem(last=False)
        pull = waiting.popleft()
        if waiting:
            self._waiting[session] = waiting
        return session, pull

    def _serve(self, item: _Item) -> None:
        if item != "differences":
            session, pull = item
            answer = self._source.answer(pull)
            self._answer(session, answer)
            self.sent_bytes += sum(memoryview(payload).nbytes for payload in answer.payloads)
            self.plain_bytes += answer.plain_bytes
        elif self._source.work():
            with self._worker.adding():
                self._has_work = True
        self.busy_seconds = time.thread_time()

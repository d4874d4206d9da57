"""The sending end of weights: one push at a time on a side thread, while training goes on.

    publish(v) ─► newest wins ─► begin_push: who kept up ─► routes ─► Push ─► report

The members of an epoch are fixed (see `learner.weights.epochs`); actors that joined since the last
push, or have caught up, are in the next one. A push never waits longer than its deadlines, and
training never waits for a push: actors whose weights are too old just get no leases.
"""

from collections import Counter, deque

from learner.config.weights import WeightsConfig
from learner.registry import ActorState
from learner.threads import Fail, Worker
from learner.weights.epochs import EpochRecord, Epochs
from learner.weights.push import Audience, Push, PushReport
from learner.weights.push_metrics import PushMetrics
from learner.weights.routes import Probation, Topology, plan_routes
from learner.weights.snapshots import Snapshot, SnapshotStore
from learner.weights.stream import WeightsStream
from protocol.messages import Route
from transfer.backends import create_backend

CLOSE_TIMEOUT_S = 1.0
PUSHES_REMEMBERED = 20


class Publisher:
    """Pushes the newest snapshot to every ready actor, until `close`."""

    def __init__(
        self,
        audience: Audience,
        snapshots: SnapshotStore,
        stream: WeightsStream,
        config: WeightsConfig,
        topology: Topology,
        address: str | None,
        metrics: PushMetrics,
        fail: Fail,
    ) -> None:
        """Broadcasts go by ``address``; None: nothing listens there.

        ``fail`` is called on the thread with what ends it.
        """
        self._audience = audience
        self._snapshots = snapshots
        self._stream = stream
        self._config = config
        self._topology = topology
        self._metrics = metrics
        self._epochs: Epochs | None = None
        if topology.backend == "gloo" or topology.backend == "nccl":
            assert address is not None
            self._epochs = Epochs(
                create_backend(topology.backend, own_address=address, device=topology.device),
                address,
                timeout_s=config.timeout_s,
                bucket_bytes=config.bucket_bytes,
            )
        self._probation = Probation()
        self._waited_for: set[str] = set()
        """Sessions of actors that were waited for in vain, or were in no push since then."""
        self._pending: tuple[Snapshot, float] | None = None
        """The newest version that no push has begun with, and the seconds to pack it."""
        self._base: Snapshot | None = None
        """The last one pushed, while somebody pulls."""
        self.history: deque[PushReport] = deque(maxlen=PUSHES_REMEMBERED)
        """The newest last."""
        self.pushes = 0
        """Versions offered, those included that nobody was there to take, or that were replaced."""
        self.evictions: Counter[str] = Counter()
        """Actors put out of epochs, by cause."""
        self._worker = Worker(
            "publisher", self._take, self._serve, drains=False, after=self._end_epochs
        )
        self._worker.start(fail)

    @property
    def backend(self) -> str:
        """How broadcasts travel, or what takes their place."""
        return self._topology.backend

    @property
    def epochs(self) -> tuple[EpochRecord, ...]:
        """The last epochs, the newest last."""
        return tuple(self._epochs.records) if self._epochs else ()

    def publish(self, snapshot: Snapshot, pack_seconds: float) -> None:
        """Push ``snapshot``; one that still waits for an earlier push is replaced by it."""
        self._snapshots.publish(snapshot)
        with self._worker.adding():
            self.pushes += 1
            self._pending = (snapshot, pack_seconds)

    def close(self) -> None:
        """End after the push at hand, or without it when it takes long."""
        self._worker.close(CLOSE_TIMEOUT_S)

    def _take(self) -> tuple[Snapshot, float] | None:
        pending, self._pending = self._pending, None
        return pending

    def _serve(self, pending: tuple[Snapshot, float]) -> None:
        self._await_latecomers()
        with self._worker.adding():
            snapshot, pack_seconds = self._take() or pending
        pushed_before = self._audience.pushed
        # Only those that kept up: an actor that is behind pulls until it has caught up, so a slow
        # or broken one costs one push its deadlines, not every push.
        if actors := self._audience.begin_push(snapshot.version):
            self._push(snapshot, actors, pack_seconds, pushed_before)
        self._audience.end_push()

    def _await_latecomers(self) -> None:
        """Hold the next push up for actors that are about to be able to take it.

        An actor that joined between two pushes and loads as long as the others do would be in the
        middle of a load whenever a push begins, and be in no broadcast ever. Once for each actor
        that misses pushes, and no longer than two such pushes take.
        """
        audience = self._audience
        self._waited_for &= audience.sessions
        if self._epochs is None or not self.history:
            return
        late = audience.catching_up() - self._waited_for
        self._waited_for |= late
        audience.wait_until(
            lambda: audience.draining or not late & audience.catching_up(),
            2 * self.history[-1].seconds,
        )

    def _push(
        self,
        snapshot: Snapshot,
        actors: list[ActorState],
        pack_seconds: float,
        pushed_before: int,
    ) -> None:
        routes = self._plan(actors)
        push = Push(
            snapshot,
            routes,
            actors,
            audience=self._audience,
            epochs=self._epochs,
            config=self._config,
            pack_seconds=pack_seconds,
        )
        self._prepare_stream(snapshot, routes, pushed_before)
        report = push.run(self._probation)
        self._waited_for -= routes.keys()
        # The push has waited for them already.
        self._waited_for |= {a.session for a in actors if a.number in report.behind}
        self.evictions.update(report.evicted.values())
        self._metrics.observe(report)
        self.history.append(report)

    def _plan(self, actors: list[ActorState]) -> dict[str, Route]:
        # Not only these: an actor may be behind because the broadcast did not reach it.
        self._probation.next_push(self._audience.sessions)
        routes = plan_routes(actors, self._topology)
        for session in routes:
            if not self._probation.admits(session):
                routes[session] = "stream"
        return routes

    def _prepare_stream(
        self, snapshot: Snapshot, routes: dict[str, Route], pushed_before: int
    ) -> None:
        """Make differences for actors that pull this version, or still pull the one before."""
        wanted = "stream" in routes.values() or self._snapshots.is_pulled
        base = self._base or self._snapshots.kept(pushed_before)
        if wanted and base is not None:
            self._stream.keep_differences(base, snapshot)
        self._base = snapshot if wanted else None

    def _end_epochs(self) -> None:
        if self._epochs is not None:
            # NCCL's communicators should not be left to the end of the process.
            self._epochs.end("the run is over")

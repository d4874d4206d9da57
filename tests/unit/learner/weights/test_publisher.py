"""The publisher between a coordinator without sockets and members that really meet over gloo."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from actors.weights.broadcast import Collective
from actors.weights.receive_buffer import ReceiveBuffer
from learner.config.weights import WeightsConfig
from learner.weights.publisher import CLOSE_TIMEOUT_S, Publisher
from learner.weights.push import PushReport
from learner.weights.push_metrics import PushMetrics
from learner.weights.routes import Topology
from learner.weights.stream import WeightsStream
from protocol.messages import Goodbye, Weights
from tests.unit.factories import Cluster, joined, make_snapshot
from transfer.shared_memory import SharedMemory

URL = "tcp://127.0.0.1:5555"
CPU = torch.device("cpu")
STATUS_INTERVAL_S = 0.1


class Member:
    """What an actor does about offers, on a thread of its own."""

    def __init__(self, scene: "Scene", session: str) -> None:
        self.scene = scene
        self.session = session
        self.hangs = False
        """It gets offers, and does nothing."""
        self.unreachable = False
        """No broadcast reaches it, but it pulls."""
        self.load_s = 0.0
        """It takes so long to load what it got, and says so meanwhile."""
        self.offers: list[Weights] = []
        self._collective = Collective(URL, CPU)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.scene.over.wait(0.002):
            for offer in self.scene.heard(self.session):
                self.offers.append(offer)
                if not self.hangs:
                    self._take(offer)

    def _take(self, offer: Weights) -> None:
        if offer.epoch is None:
            # What it was offered before may go on until its deadline.
            self._collective = Collective(URL, CPU)
            self._load(offer.version, "stream")
        elif not self.unreachable:
            collective = self._collective
            threading.Thread(
                target=self._receive, args=(collective, offer), name="receive", daemon=True
            ).start()

    def _receive(self, collective: Collective, offer: Weights) -> None:
        snapshot = make_snapshot(offer.version)
        buffer = ReceiveBuffer(SharedMemory(offer.num_bytes), list(snapshot.specs))
        try:
            collective.receive(offer, buffer.begin(offer.version))
        except Exception:
            return
        assert torch.equal(buffer.memory.tensor, snapshot.packed)
        self._load(offer.version, "collective")

    def _load(self, version: int, route: str) -> None:
        loaded_at = time.monotonic() + self.load_s
        while (left := loaded_at - time.monotonic()) > 0 and not self.hangs:
            if self.scene.over.is_set():
                return
            self.scene.status(self.session, loading=version)
            time.sleep(min(left, STATUS_INTERVAL_S))
        if not self.hangs:
            self.scene.confirm(self.session, version, route)


class Scene:
    """A learner's publisher and its members; only one thread at a time speaks to the cluster."""

    def __init__(self, *sessions: str, timeout_s: float = 0.6, backend: Any = "gloo") -> None:
        self.cluster: Cluster = joined(*sessions, clock=time.monotonic)
        self._lock = threading.Lock()
        self.over = threading.Event()
        self.stream = WeightsStream(self.cluster.chunks)
        self.stream.start(lambda session, answer: None, self.cluster.coordinator.fail)
        self.publisher = Publisher(
            self.cluster.coordinator,
            self.cluster.snapshots,
            self.stream,
            WeightsConfig(timeout_s=timeout_s, push_timeout_s=4 * timeout_s),
            Topology(backend, "", CPU, ""),
            "127.0.0.1",
            PushMetrics(CollectorRegistry(), self.cluster.phases),
            self.cluster.coordinator.fail,
        )
        for session in sessions:
            self.heard(session)
        self.members = {session: Member(self, session) for session in sessions}

    def __getitem__(self, session: str) -> Member:
        return self.members[session]

    def heard(self, session: str) -> list[Weights]:
        with self._lock:
            return self.cluster.heard(session, Weights)

    def confirm(self, session: str, version: int, route: str) -> None:
        with self._lock:
            self.cluster.weights_ready(session, version, route=route)

    def status(self, session: str, loading: int) -> None:
        with self._lock:
            self.cluster.status(session, loading=loading)

    def join(self, session: str) -> None:
        """A newcomer, which has the newest version."""
        with self._lock:
            self.cluster.hello(session)
            self.cluster.weights_ready(session, self.cluster.snapshots.latest.version)
            self.cluster.heard(session, Weights)
        self.members[session] = Member(self, session)

    def join_late(self, session: str, version: int, load_s: float) -> None:
        """A newcomer, which has an older version and loads what it is offered now."""
        with self._lock:
            self.cluster.hello(session)
            self.cluster.heard(session, Weights)
            self.cluster.weights_ready(session, version)
        member = self.members[session] = Member(self, session)
        member.load_s = load_s

    def leave(self, session: str) -> None:
        with self._lock:
            self.cluster.say(session, Goodbye(cause="test"))

    def push(self, version: int) -> PushReport:
        self.publisher.publish(make_snapshot(version), pack_seconds=0.0)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.publisher.history and self.publisher.history[-1].version == version:
                return self.publisher.history[-1]
            assert self.cluster.coordinator.failure is None
            time.sleep(0.002)
        raise AssertionError("no report")

    def waits_for(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 2
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.002)
        return condition()

    def versions(self) -> dict[str, int]:
        return {actor.session: actor.version for actor in self.cluster.coordinator.actors()}

    def close(self) -> None:
        self.over.set()
        self.cluster.coordinator.drain("the test is over")
        self.publisher.close()
        self.stream.close()
        # Python must not end under a thread that is in a collective: that aborts the process.
        for thread in threading.enumerate():
            if thread.name in ("broadcast", "collective", "receive"):
                thread.join(15)


@pytest.fixture
def scene(request) -> Iterator[Scene]:
    scene = Scene(*getattr(request, "param", ("a", "b")))
    yield scene
    scene.close()


def ends(scene: Scene) -> list[str]:
    return [epoch.ended for epoch in scene.publisher.epochs]


def test_the_same_members_stay_in_one_epoch(scene):
    reports = [scene.push(version) for version in (1, 2, 3)]
    assert [report.epoch for report in reports] == [1, 1, 1]
    assert all(report.routes == {"collective": 2} for report in reports)
    [epoch] = scene.publisher.epochs
    assert (epoch.members, epoch.first_version, epoch.pushes, epoch.ended) == ([1, 2], 1, 3, "")
    assert epoch.form_seconds > 0
    assert scene.versions() == {"a": 3, "b": 3}


def test_who_joins_is_in_the_next_epoch_and_who_leaves_in_none(scene):
    scene.push(1)
    scene.join("c")
    assert scene.push(2).routes == {"collective": 3}
    scene.leave("a")
    assert scene.push(3).routes == {"collective": 2}
    assert [epoch.members for epoch in scene.publisher.epochs] == [[1, 2], [1, 2, 3], [2, 3]]
    assert ends(scene) == ["actor 3 joined", "actor 1 left", ""]
    assert scene.versions() == {"b": 3, "c": 3}


@pytest.mark.parametrize("scene", [("a", "b", "c")], indirect=True)
def test_a_member_that_hangs_is_evicted_and_the_others_have_the_version(scene):
    scene.push(1)
    scene["b"].hangs = True
    started = time.monotonic()
    report = scene.push(2)
    assert time.monotonic() - started < 4 * 0.6 + 1
    assert (report.evicted, report.behind) == ({2: "late"}, [2])
    assert scene.versions() == {"a": 2, "b": 1, "c": 2}
    assert scene.publisher.evictions == {"late": 1}
    report = scene.push(3)
    assert (report.routes, report.evicted) == ({"collective": 2}, {})
    assert scene.versions() == {"a": 3, "b": 1, "c": 3}


def test_a_load_that_takes_longer_than_the_deadline_keeps_its_epoch(scene):
    for session in ("a", "b"):
        scene[session].load_s = 1.1
    reports = [scene.push(version) for version in (1, 2, 3)]
    assert [(r.epoch, r.evicted, r.behind) for r in reports] == [(1, {}, [])] * 3
    assert all(1.1 <= report.seconds < 2.4 for report in reports)
    assert ends(scene) == [""]
    assert scene.versions() == {"a": 3, "b": 3}


def join_while_others_load(scene: Scene, load_s: float) -> None:
    """``c`` comes in the middle of push 2, which takes .4 s."""
    for session in ("a", "b"):
        scene[session].load_s = 0.4
    scene.push(1)
    scene.publisher.publish(make_snapshot(2), pack_seconds=0.0)
    assert scene.waits_for(lambda: scene[session].offers[-1].version == 2)
    scene.join_late("c", 1, load_s)
    scene.push(2)


def test_an_actor_that_would_load_whenever_a_push_begins_is_waited_for(scene):
    join_while_others_load(scene, load_s=0.4)
    reports = [scene.push(version) for version in (3, 4)]
    assert [report.routes for report in reports] == [{"collective": 3}] * 2
    assert ends(scene) == ["actor 3 joined", ""]


def test_what_takes_longer_than_two_pushes_to_load_is_waited_for_once(scene):
    join_while_others_load(scene, load_s=60.0)
    waits = []
    for version in (3, 4):
        began = time.monotonic()
        report = scene.push(version)
        assert report.routes == {"collective": 2}
        waits.append(time.monotonic() - began - report.seconds)
    assert waits[0] > 0.8 and waits[1] < 0.4


def test_a_member_that_freezes_is_found_though_the_others_load_for_long(scene):
    scene.push(1)
    scene["a"].load_s = 1.8
    scene["b"].hangs = True
    began = time.monotonic()
    scene.publisher.publish(make_snapshot(2), pack_seconds=0.0)
    assert scene.waits_for(lambda: ends(scene) != [""])
    # The deadline.
    assert 0.6 <= time.monotonic() - began < 1.4


def test_a_member_that_freezes_while_it_loads_is_found_too(scene):
    scene.push(1)
    for session in ("a", "b"):
        scene[session].load_s = 2.0
    threading.Timer(0.5, lambda: setattr(scene["b"], "hangs", True)).start()
    began = time.monotonic()
    scene.publisher.publish(make_snapshot(2), pack_seconds=0.0)
    assert scene.waits_for(lambda: ends(scene) != [""])
    # Its last word, and the deadline after that.
    assert 0.5 - STATUS_INTERVAL_S + 0.6 <= time.monotonic() - began < 1.8


def test_no_load_is_waited_for_longer_than_a_push_may_take(scene):
    """However often the actor says that it loads; 4 * 0.6 s."""
    scene["b"].load_s = 60.0
    began = time.monotonic()
    report = scene.push(1)
    scene["b"].hangs = True
    assert 2.4 <= time.monotonic() - began < 3.6
    assert (report.evicted, report.behind) == ({2: "late"}, [2])


@pytest.mark.parametrize("scene", [("a", "b", "c")], indirect=True)
def test_a_member_that_is_gone_ends_the_wait_at_once(scene):
    """Not at the deadline of the collective: who lives is known from the control channel."""
    scene.publisher._config = WeightsConfig(timeout_s=6, push_timeout_s=60)
    scene.publisher._epochs._timeout_s = 6
    scene.push(1)
    scene["c"].hangs = True
    threading.Timer(0.3, scene.leave, ["c"]).start()
    started = time.monotonic()
    report = scene.push(2)
    assert time.monotonic() - started < 3
    assert report.evicted == {3: "gone"}
    assert ends(scene) == ["actor 3 gone"]
    assert scene.push(3).epoch == 2


@pytest.mark.parametrize("scene", [("a", "b", "c")], indirect=True)
def test_a_member_whose_connection_broke_first_and_who_is_gone_then_is_named(scene):
    scene.push(1)
    scene["c"].hangs = True
    # After the epoch has ended, while the push still waits for it.
    threading.Timer(0.9, scene.leave, ["c"]).start()
    report = scene.push(2)
    assert (report.evicted, report.behind) == ({3: "gone"}, [])
    assert ends(scene) == ["actor 3 gone"]


@pytest.mark.parametrize("scene", [("a", "b")], indirect=True)
def test_an_actor_that_no_broadcast_reaches_costs_less_and_less(scene):
    """It pulls, and holds up the others in the 1st, 2nd, 4th, 8th ... push that it is there for.

    Whatever else changes in the epoch, the one that did not come is to blame.
    """
    scene.push(1)
    scene.join("far")
    scene["far"].unreachable = True
    slow = []
    for version in range(2, 14):
        report = scene.push(version)
        if report.routes.get("collective") == 3:
            slow.append(version)
            assert ends(scene)[-1] == "actor 3 did not come"
        assert scene.versions() == {"a": version, "b": version, "far": version}
    assert slow == [2, 3, 5, 9]


def test_without_a_broadcast_everybody_is_told_to_pull():
    scene = Scene("a", "b", backend="stream")
    report = scene.push(1)
    assert (report.routes, report.epoch) == ({"stream": 2}, 0)
    assert scene.publisher.epochs == ()
    assert scene.versions() == {"a": 1, "b": 1}
    scene.close()


def test_who_pulls_every_version_gets_differences():
    """From the second push on, of which the publisher knows that somebody pulls."""
    scene = Scene("a", backend="stream")
    kept = []
    scene.stream.keep_differences = lambda previous, new: kept.append(  # type: ignore[method-assign]
        (previous.version, new.version)
    )
    for version in (1, 2, 3):
        scene.push(version)
    assert kept == [(1, 2), (2, 3)]
    scene.close()


def test_closing_does_not_wait_for_a_hung_actor(scene):
    """A broadcast cannot be interrupted, and its deadline is longer than a stop may take."""
    scene["b"].hangs = True
    scene.publisher._epochs._timeout_s = 4.0
    scene.publisher.publish(make_snapshot(1), pack_seconds=0.0)
    while not scene.publisher.epochs:
        time.sleep(0.01)
    scene.cluster.coordinator.drain("SIGTERM")
    started = time.monotonic()
    scene.publisher.close()
    assert time.monotonic() - started < CLOSE_TIMEOUT_S + 0.5


def test_who_confirms_late_is_offered_the_version_that_was_pushed_without_it(scene):
    """It had all bytes of the broadcast; only its engine was slow."""
    scene["b"].hangs = True
    scene.push(1)
    assert scene.push(2).routes == {"collective": 1}
    scene["b"].hangs = False
    scene.confirm("b", 1, "collective")
    assert scene.waits_for(lambda: scene.versions()["b"] == 2)


def test_an_actor_that_joined_again_between_two_pushes_begins_an_epoch(scene):
    """Under its old session, but it has left the old group."""
    scene.push(1)
    scene.leave("b")
    scene.join("b")
    report = scene.push(2)
    assert (report.epoch, report.evicted) == (2, {})
    assert ends(scene) == ["actor 2 left, actor 3 joined", ""]
    assert scene.versions() == {"a": 2, "b": 2}


def test_an_unreachable_actor_that_pulls_slowly_is_not_forgiven_while_it_is_behind(scene):
    """It is behind in every other push; tried in the 1st, 3rd, 5th, 9th, not in every one."""
    scene.push(1)
    scene.join("far")
    scene["far"].unreachable = True
    tried = []
    for version in range(2, 12):
        scene["far"].hangs = True
        report = scene.push(version)
        if report.routes.get("collective") == 3:
            tried.append(version)
        if version % 2:
            scene["far"].hangs = False
            scene.confirm("far", version, "stream")
    assert tried == [2, 4, 6, 10]


def test_a_push_that_fails_ends_the_run_with_its_cause():
    scene = Scene("a", backend="stream")

    def broken(actors: Any) -> Any:
        raise KeyError("no such route")

    scene.publisher._plan = broken  # type: ignore[method-assign]
    scene.publisher.publish(make_snapshot(1), pack_seconds=0.0)
    assert scene.waits_for(lambda: scene.cluster.coordinator.failure is not None)
    assert str(scene.cluster.coordinator.failure) == "publisher died: 'no such route'"
    scene.close()


def test_every_push_is_counted_when_it_is_over(scene):
    scene.push(1)
    phases = scene.cluster.phases.mean_seconds
    assert {"weights_pack", "weights_confirm", "weights_whole"} <= phases.keys()

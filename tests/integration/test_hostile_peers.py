"""Hostile peers on the learner's real socket: it grows by nothing, and a good actor goes on."""

import gc
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar

import pytest
import zmq

from learner.coordinator.access import Access
from learner.coordinator.intake import Intake
from protocol.framing import Buffer, decode_to_actor, encode
from protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Error,
    Header,
    Hello,
    Lease,
    WeightsReady,
    Welcome,
)
from protocol.observability import Heartbeat
from protocol.sockets import bind_learner, parse_tcp
from tests.integration.processes import resident_bytes, wait_for
from tests.unit.factories import Cluster, make_config, make_snapshot, make_status
from tests.unit.mutants import Mutants
from tests.unit.wire_examples import FRAMES

pytestmark = pytest.mark.timeout(240)

NUM_HOSTILE = 10_000
MAX_FRAME_BYTES = 1 << 20
MAX_GROWTH_BYTES = 32 << 20


class Learner:
    """The real coordinator behind the real intake, on a free port of this machine."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.cluster = Cluster(make_config(training={"steps": 10**9}))
        bound = bind_learner(context, "tcp://127.0.0.1:0", MAX_FRAME_BYTES)
        self.url = bound.url
        self.coordinator = self.cluster.coordinator
        self.coordinator.open_training()
        self.heartbeat = Heartbeat("intake", limit_s=10.0)
        self.intake = Intake(bound, Access(bound, None), self.coordinator, self.heartbeat)

    @property
    def num_bad(self) -> int:
        return self.coordinator.counters.bad_messages


Heard = TypeVar("Heard", bound=Header)


class Peer:
    """A DEALER that says what it likes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], url: str, identity: bytes) -> None:
        self.session = identity.decode("latin-1")
        self.socket = context.socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.SNDTIMEO, 10_000)):
            self.socket.setsockopt(option, value)
        self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(url)
        # Also for a peer that a test forgets before its context ends.
        weakref.finalize(self, self.socket.close)

    def send(self, frames: Sequence[Buffer]) -> None:
        self.socket.send_multipart(frames)

    def say(self, header: Header, payloads: Sequence[Buffer] = ()) -> None:
        self.send(encode(header, payloads))

    def hear(self, kind: type[Heard]) -> Heard:
        """The next message of one kind; others are dropped."""
        while self.socket.poll(30_000):
            message, _ = decode_to_actor(self.socket.recv_multipart())
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__} for {self.session!r}")

    def drop_answers(self) -> None:
        while self.socket.poll(0):
            self.socket.recv_multipart()

    def join(self, **hello) -> None:
        """Hello, weights and room for one lease."""
        self.say(Hello(protocol=PROTOCOL_VERSION, session=self.session, **hello))
        self.hear(Welcome)
        digest = make_snapshot(0).digest
        self.say(
            WeightsReady(
                version=0, digest=digest, route="stream", receive_seconds=0, load_seconds=0
            )
        )
        self.say(make_status(capacity=1))


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def learner(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Learner]:
    learner = Learner(context)
    yield learner
    learner.intake.close()


@pytest.fixture
def good(context: zmq.Context[zmq.Socket[bytes]], learner: Learner) -> Callable[[], None]:
    """Roll out one lease, have its group accepted, and train when there is a batch."""
    peer = Peer(context, learner.url, b"good")
    peer.join()

    def roll_out() -> None:
        lease = peer.hear(Lease)
        peer.say(*learner.cluster.group_message(lease.lease, version=0))
        assert peer.hear(Ack).verdict == "accepted"
        # Its weights stay those of version 0, so what it made is left to the buffer's limit.
        learner.cluster.buffer.take(1, 0, timeout_s=0)
        learner.cluster.buffer.step_done()
        learner.coordinator.make_room()

    return roll_out


def test_ten_thousand_hostile_messages_leave_no_trace(context, learner, good):
    hostile = Peer(context, learner.url, b"hostile")
    hostile.join()
    random = Random(1)
    mutants = Mutants(random, list(FRAMES.values()))
    extremes = ([b""], [b""] * 500, [bytes(MAX_FRAME_BYTES)] * 3, [random.randbytes(100_000)])

    def send(number: int) -> None:
        for index in range(number):
            frames = random.choice(extremes) if index % 50 == 0 else mutants.next()
            hostile.send([frame[:MAX_FRAME_BYTES] for frame in frames] or [b""])
            hostile.drop_answers()
            if index % 500 == 499:
                # What lies in queues is bounded by them, but it is memory too.
                wait_until_handled()

    def wait_until_handled() -> None:
        # Messages of one peer stay in order: this is refused after all others were handled.
        hostile.say(Hello(protocol=PROTOCOL_VERSION, session="somebody-else"))
        while "somebody-else" not in getattr(hostile.hear(Error), "message", ""):
            pass

    good()
    send(NUM_HOSTILE // 2)
    good()
    gc.collect()
    before, bad_before = resident_bytes(os.getpid()), learner.num_bad
    started = time.monotonic()
    send(NUM_HOSTILE)
    seconds = time.monotonic() - started
    good()
    gc.collect()
    grown = resident_bytes(os.getpid()) - before
    print(
        f"{NUM_HOSTILE / seconds:.0f} messages/s, {learner.num_bad - bad_before} of them bad; "
        f"resident memory grew by {grown / 2**20:.1f} MiB"
    )
    assert learner.num_bad - bad_before > NUM_HOSTILE / 2
    assert grown < MAX_GROWTH_BYTES
    assert learner.heartbeat.healthy
    assert all(books.balanced for books in learner.coordinator.leases.counts.values())
    learner.coordinator.raise_if_failed()


def test_a_frame_over_the_limit_disconnects_its_peer_and_nobody_else(context, learner, good):
    hostile = Peer(context, learner.url, b"hostile")
    monitor = hostile.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    hostile.say(Hello(protocol=PROTOCOL_VERSION, session="hostile"))
    hostile.hear(Welcome)
    hostile.send([bytes(MAX_FRAME_BYTES + 1)])
    assert monitor.poll(10_000), "still connected"
    hostile.socket.disable_monitor()
    monitor.close()
    good()
    assert learner.num_bad == 0


def test_bytes_that_are_no_zeromq_make_nobody_an_actor(learner, good):
    random = Random(1)
    for number in range(50):
        with socket.create_connection(parse_tcp(learner.url)) as raw:
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" if number % 2 else b""
            raw.sendall(greeting + random.randbytes(random.choice((0, 10, 10_000))))
    raw = socket.create_connection(parse_tcp(learner.url))
    good()
    raw.close()
    # ZeroMQ takes some of it for the first version of its protocol, which has no greeting.
    print(f"{learner.num_bad} bad messages")
    assert [actor.session for actor in learner.coordinator.actors()] == ["good"]
    assert learner.heartbeat.healthy


def test_a_peer_with_any_routing_id_gets_its_answers(context, learner):
    for identity in (b"\xff\xfe", b"\x80\n", "é".encode(), b"\xef\xbf\xbd"):
        peer = Peer(context, learner.url, identity)
        peer.send([b"nonsense"])
        assert peer.hear(Error).code == "bad_message"
        # But no other name may be told from it, so it does not become an actor.
        peer.say(Hello(protocol=PROTOCOL_VERSION, session="a"))
        assert peer.hear(Error).code == "refused"
    assert learner.coordinator.num_live == 0


def test_the_metrics_of_an_actor_are_looked_for_where_it_is(context, learner):
    peer = Peer(context, learner.url, b"liar")
    peer.join(metrics_host="169.254.169.254", metrics_port=80)
    wait_for(lambda: learner.coordinator.num_live == 1, "the actor")
    [actor] = learner.coordinator.actors()
    assert (actor.hello.metrics_host, actor.hello.metrics_port) == ("127.0.0.1", 80)

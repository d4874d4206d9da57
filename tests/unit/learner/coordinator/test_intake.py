"""Intake between a real coordinator and a socket: what makes it send."""

import os
from collections.abc import Iterator

import pytest
import zmq

from learner.coordinator import intake as module
from learner.coordinator.access import Access
from learner.coordinator.intake import Intake
from protocol.framing import decode_to_actor, encode
from protocol.messages import PROTOCOL_VERSION, Drain, Header, Hello, Welcome
from protocol.observability import Heartbeat
from protocol.sockets import bind_learner
from tests.unit.factories import Cluster

SILENT_S = 30.0


class Peer:
    """One connection to an intake that does nothing by itself for a long time."""

    def __init__(self, cluster: Cluster) -> None:
        self._context = zmq.Context()
        sockets = bind_learner(self._context, "tcp://127.0.0.1:0", 1 << 20)
        heartbeat = Heartbeat("intake", limit_s=10 * SILENT_S)
        self.intake = Intake(sockets, Access(sockets, None), cluster.coordinator, heartbeat)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"a")
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(SILENT_S * 500))
        self._socket.connect(sockets.url)
        self._socket.send_multipart(encode(Hello(protocol=PROTOCOL_VERSION, session="a"), ()))
        self.hear(Welcome)

    def hear(self, kind: type[Header]) -> Header:
        while True:
            frames = self._socket.recv_multipart(copy=False)
            header, _ = decode_to_actor([frame.buffer for frame in frames])
            if isinstance(header, kind):
                return header

    def close(self) -> None:
        self.intake.close()
        self._socket.close()
        self._context.term()


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def peer(cluster: Cluster, monkeypatch) -> Iterator[Peer]:
    monkeypatch.setattr(module, "TICK_S", SILENT_S)
    peer = Peer(cluster)
    yield peer
    peer.close()


def test_a_message_of_another_thread_is_sent_at_once(cluster, peer):
    """Long before the next tick, and nobody but the outbox has told intake of it."""
    for cause in ("first", "second", "third"):
        cluster.coordinator.drain(cause)
        assert peer.hear(Drain).cause == cause


def test_many_messages_wake_intake_once_while_it_waits(cluster, peer, monkeypatch):
    written = []
    write = os.write

    def count(descriptor: int, data: bytes) -> int:
        written.append(data)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", count)
    with cluster.coordinator._lock:
        # Fewer than ZeroMQ queues for one peer: none is dropped, however late that one reads.
        for number in range(200):
            cluster.coordinator._registry.send("a", Drain(cause=f"number {number}"))
    while peer.hear(Drain).cause != "number 199":
        pass
    # It may have gone to wait again in between, but not for every message.
    assert len(written) < 100


def test_what_is_at_an_end_is_not_woken(cluster, peer):
    peer.intake.close()
    cluster.coordinator.drain("nobody sends it")
    assert len(cluster.coordinator.outbox) == 1

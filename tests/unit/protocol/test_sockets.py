"""The socket factory: limits that hold, whatever a peer does."""

import random
from typing import Any

import pytest
import zmq
import zmq.asyncio

from protocol.errors import ConfigError
from protocol.keys import ActorKeys, KeyPair
from protocol.sockets import bind_learner, connect_actor, is_loopback, is_wildcard, parse_tcp


def new_key() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


async def test_actors_that_lose_a_learner_do_not_come_back_in_step():
    context = zmq.asyncio.Context()
    intervals: set[Any] = set()
    for seed in range(8):
        socket, monitor = connect_actor(
            context, "tcp://127.0.0.1:1", b"actor", rng=random.Random(seed)
        )
        intervals.add((socket.get(zmq.RECONNECT_IVL), socket.get(zmq.RECONNECT_IVL_MAX)))
        socket.disable_monitor()
        monitor.close()
        socket.close(linger=0)
    context.term()
    assert len(intervals) == 8
    # Spread over a second, whichever of them it is.
    assert all(500 <= first <= 1500 and 3000 <= longest <= 6000 for first, longest in intervals)


@pytest.mark.parametrize("url", ["tcp://10.1.2.3:5555", "tcp://*:5555", "tcp://learner:5555"])
def test_without_keys_no_socket_leaves_this_machine(url):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for connect in (
        lambda: bind_learner(context, url, 1 << 20),
        lambda: connect_actor(zmq.asyncio.Context.shadow(context), url, b"actor"),
    ):
        with pytest.raises(ConfigError, match="needs keys: see gdpo keygen"):
            connect()
    context.term()


def test_while_nobody_answers_for_keys_nobody_gets_in():
    """By default CURVE lets everybody in who has the learner's public key."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    learner = new_key()
    sockets = bind_learner(context, "tcp://127.0.0.1:0", 1 << 20, learner)
    assert sockets.authenticator is not None
    sockets.authenticator.close()
    keys = ActorKeys(new_key(), learner.public)
    peers: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peer = peers.socket(zmq.DEALER)
    peer.curve_publickey = keys.own.public.encode()
    peer.curve_secretkey = keys.own.secret.encode()
    peer.curve_serverkey = keys.learner.encode()
    peer.connect(sockets.url)
    peer.send(b"hello")
    assert sockets.router.poll(1000) == 0
    peers.destroy(linger=0)
    sockets.close()
    context.term()


@pytest.mark.parametrize("url", ["tcp://[::1]:5555", "tcp://[2001:db8::1]:1"])
def test_ipv6_is_refused_in_words(url):
    with pytest.raises(ConfigError, match="IPv6 is not supported"):
        parse_tcp(url)


def test_which_hosts_are_loopback_and_which_are_all_addresses():
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "127.8.8.8")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "*", "10.0.0.1", "gpu1")] == [False] * 4
    assert [is_wildcard(host) for host in ("0.0.0.0", "*", "127.0.0.1")] == [True, True, False]

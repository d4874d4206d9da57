"""The socket factory: every ZeroMQ socket of the system is made here, with every limit set.

Nothing blocks for ever: sends never wait (a full queue is an error to handle), closing drops what
is unsent after `LINGER_MS`, queues are bounded in messages, frames in bytes.
"""

import ipaddress
import socket as stdlib_socket
from urllib.parse import urlsplit

import zmq
import zmq.asyncio

from protocol.errors import ConfigError
from protocol.framing import MAX_PAYLOAD_BYTES

LINGER_MS = 1000
QUEUED_MESSAGES = 1000


def bind_learner(
    context: zmq.Context[zmq.Socket[bytes]], url: str, max_frame_bytes: int
) -> zmq.Socket[bytes]:
    """The learner's ROUTER socket, bound to ``tcp://HOST:PORT``; port 0 takes any free one.

    A peer that sends a frame over ``max_frame_bytes`` is disconnected.
    """
    require_loopback(url)
    socket = context.socket(zmq.ROUTER)
    _limit(socket)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    # An actor that reconnects keeps its id: without this its new connection would be ignored for
    # as long as the old one is not known to be dead.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    # Without it a message to a peer that has gone is dropped in silence.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    try:
        socket.bind(url)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise ConfigError(
            f"cannot listen on {url}: {error.strerror}; choose another learner.bind"
        ) from error
    return socket


def connect_actor(context: zmq.asyncio.Context, url: str, identity: bytes) -> zmq.asyncio.Socket:
    """An actor's DEALER socket; reconnects by itself, with growing intervals."""
    parse_tcp(url)
    socket = context.socket(zmq.DEALER)
    _limit(socket)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
    try:
        socket.connect(url)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise ConfigError(f"cannot connect to {url}: {error.strerror}") from error
    return socket


def parse_tcp(url: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``; raises `ConfigError`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.scheme != "tcp" or parts.path:
        raise ConfigError(f"{url!r} is no address; write tcp://HOST:PORT")
    return host, port


def require_loopback(url: str) -> str:
    """The url, unless others could connect to it: then `ConfigError`, as nothing is encrypted."""
    host, _ = parse_tcp(url)
    try:
        loopback = host == "localhost" or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"{url} is no IPv4 loopback address but reachable from other machines, and this "
            "version neither encrypts nor authenticates; use tcp://127.0.0.1:PORT"
        )
    return url


def address_towards(host: str, port: int) -> str:
    """This machine's own IP address as ``host`` sees it."""
    with stdlib_socket.socket(stdlib_socket.AF_INET, stdlib_socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _limit(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, QUEUED_MESSAGES)
    socket.setsockopt(zmq.SNDTIMEO, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    socket.setsockopt(zmq.IMMEDIATE, 0)

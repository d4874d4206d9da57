"""The socket factory: every ZeroMQ socket of the system is made here, with every limit set.

Nothing blocks for ever: sends never wait (a full queue is an error to handle), closing drops what
is unsent after `LINGER_MS`, queues are bounded in messages, frames in bytes. What can be reached
from another machine is encrypted and authenticated by CURVE.
"""

import ipaddress
import random
import socket as stdlib_socket
import struct
from dataclasses import dataclass
from urllib.parse import urlsplit

import zmq
import zmq.asyncio

from protocol.errors import ConfigError
from protocol.framing import MAX_PAYLOAD_BYTES
from protocol.keys import ActorKeys, KeyPair

LINGER_MS = 1000
QUEUED_MESSAGES = 1000
RECEIVED_MESSAGES = 64
"""Queued for the learner from each actor, because groups are large and actors many: what does not
fit stays in the actor's own queue. The learner takes them out at once."""
HANDSHAKE_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
# Intervals between an actor's attempts to connect: each actor draws its own. They grow from the
# first to the longest while nobody listens; where something (such as a proxy) accepts and hangs up,
# they stay at the first, which is why that is not shorter.
RECONNECT_FIRST_MS = (500, 1500)
RECONNECT_LONGEST_MS = (3000, 6000)

# How the handshake of a connection can fail, as values of EVENT_HANDSHAKE_FAILED_PROTOCOL.
WRONG_LEARNER_KEY = 0x11000001
ENCRYPTION_MISMATCH = 0x11000002
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class LearnerSockets:
    """The learner's sockets, all used by one thread."""

    router: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    """Events of connections and handshakes; it must be drained, since a full one stops traffic."""
    authenticator: zmq.Socket[bytes] | None
    """Asks, by ZAP, whether a key may connect; None without keys."""

    @property
    def url(self) -> str:
        """Address of the router, with its real port."""
        return self.router.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        """Close them all."""
        self.router.disable_monitor()
        for socket in (self.monitor, self.router, self.authenticator):
            if socket is not None:
                socket.close()


def bind_learner(
    context: zmq.Context[zmq.Socket[bytes]],
    url: str,
    max_frame_bytes: int,
    keys: KeyPair | None = None,
) -> LearnerSockets:
    """The learner's ROUTER socket, bound to ``tcp://HOST:PORT``; port 0 takes any free one.

    With ``keys`` the authenticator decides who may connect. A peer that sends a frame over
    ``max_frame_bytes`` is disconnected. Raises `ConfigError`.
    """
    if keys is None:
        _require_loopback(url)
    authenticator = None
    socket = context.socket(zmq.ROUTER)
    _limit(socket)
    socket.setsockopt(zmq.RCVHWM, RECEIVED_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    # An actor that reconnects keeps its id: without this its new connection would be ignored
    # until the old one is known to be dead.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    # Without it a message to a peer that has gone is dropped in silence.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        # By default CURVE lets every key in while nobody answers ZAP.
        socket.setsockopt(zmq.ZAP_DOMAIN, b"gdpo")
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        authenticator = context.socket(zmq.REP)
        authenticator.setsockopt(zmq.LINGER, 0)
        authenticator.bind(_ZAP_ENDPOINT)
    monitor = socket.get_monitor_socket(
        HANDSHAKE_EVENTS | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
    )
    sockets = LearnerSockets(socket, monitor, authenticator)
    try:
        socket.bind(url)
    except zmq.ZMQError as error:
        sockets.close()
        raise ConfigError(
            f"cannot listen on {url}: {error.strerror}; choose another endpoints.bind"
        ) from error
    return sockets


def connect_actor(
    context: zmq.asyncio.Context,
    url: str,
    identity: bytes,
    keys: ActorKeys | None = None,
    rng: random.Random | None = None,
) -> tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]:
    """An actor's DEALER socket, which reconnects by itself, and the monitor of its handshakes.

    ``rng`` spreads the attempts of many actors that lost one learner. Raises `ConfigError`.
    """
    if keys is None:
        _require_loopback(url)
    parse_tcp(url)
    rng = rng or random.SystemRandom()
    socket = context.socket(zmq.DEALER)
    _limit(socket)
    socket.setsockopt(zmq.IDENTITY, identity)
    if keys is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret.encode())
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.learner.encode())
    # ZeroMQ's own jitter is below the first interval, however long the intervals have become.
    socket.setsockopt(zmq.RECONNECT_IVL, rng.randint(*RECONNECT_FIRST_MS))
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, rng.randint(*RECONNECT_LONGEST_MS))
    monitor = socket.get_monitor_socket(HANDSHAKE_EVENTS)
    try:
        socket.connect(url)
    except zmq.ZMQError as error:
        socket.disable_monitor()
        monitor.close()
        socket.close(linger=0)
        raise ConfigError(f"cannot connect to {url}: {error.strerror}") from error
    return socket, monitor


def read_event(frames: list[bytes]) -> tuple[int, int]:
    """A monitor's message as one of ZeroMQ's events and its value."""
    event, value = struct.unpack("=Hi", frames[0])
    return event, value


def parse_tcp(url: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``; raises `ConfigError`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.scheme != "tcp" or parts.path:
        raise ConfigError(f"{url!r} is no address; write tcp://HOST:PORT")
    if ":" in host:
        raise ConfigError(f"{url!r}: IPv6 is not supported; write an IPv4 address or a name")
    return host, port


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address of ``host``."""
    try:
        return host == "localhost" or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether ``host`` stands for all addresses of a machine."""
    return host in ("*", "0.0.0.0")  # noqa: S104


def address_towards(host: str, port: int) -> str:
    """This machine's own IP address as ``host`` sees it."""
    with stdlib_socket.socket(stdlib_socket.AF_INET, stdlib_socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _require_loopback(url: str) -> None:
    host, _ = parse_tcp(url)
    if not is_loopback(host):
        raise ConfigError(
            f"{url} is another machine, or reachable from one, which needs keys: see gdpo keygen; "
            "for an actor they are --key and --learner-key, for a learner keys.secret and "
            "keys.allowed"
        )


def _limit(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, QUEUED_MESSAGES)
    socket.setsockopt(zmq.SNDTIMEO, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    socket.setsockopt(zmq.IMMEDIATE, 0)
    # TCP notices a vanished peer. ZeroMQ's own heartbeats, of either side, abort the process if
    # a peer goes away whose queue is full (libzmq issue 4364, open in 4.3.5).
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 2)
    socket.setsockopt(zmq.TCP_MAXRT, 20_000)

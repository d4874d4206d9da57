"""Access to the coordinator: keys, handshakes, and the key of every single message.

    TCP ──► CURVE handshake ──► is the key listed? ──► message: still listed? its own session? ──►
                  │                    │                            │
                  ▼                    ▼                            ▼
          connection refused   connection refused           message refused, never decoded

ZeroMQ asks about a key when a connection is made, by ZAP (RFC 27), and never again. So a message's
key, which ZeroMQ attaches to it and a peer cannot choose, is looked at once more. All of it runs on
intake's thread: no thread of its own can die and leave the door open or shut.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

import zmq
from zmq.utils import z85

from protocol.keys import AllowList
from protocol.sockets import (
    ENCRYPTION_MISMATCH,
    WRONG_LEARNER_KEY,
    LearnerSockets,
    read_event,
)

log = logging.getLogger("learner")

SAY_AGAIN_S = 60.0
_MAX_SAID = 20
# A flood of connections must not keep intake from its messages.
_EVENTS_PER_TURN = 200
_EXPLAINED = {
    "unknown_key": "its key is not in keys.allowed",
    "wrong_learner_key": "it has another learner's public key (--learner-key)",
    "encryption_mismatch": "it has no keys and this learner has, or the other way round",
    "other_protocol": "it speaks another protocol",
    "no_handshake": "it left, or was silent, before it had shown a key",
    "withdrawn_key": "its key has been withdrawn",
    "foreign_session": "it uses the session of an actor with another key",
}


class Access:
    """Answers ZeroMQ's questions about keys, watches handshakes and checks messages' senders.

    ``allowed`` is None without keys: then everybody on this machine may connect.
    """

    def __init__(
        self,
        sockets: LearnerSockets,
        allowed: AllowList | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sockets = sockets
        self._allowed = allowed
        self._clock = clock
        self._handshakes = Handshakes()
        self._said: set[str] = set()
        self._forget_said_at = 0.0
        self.connections_refused: Counter[str] = Counter()
        """Counts by cause, like those of messages."""
        self.messages_refused: Counter[str] = Counter()

    def allows(self, key: str) -> bool:
        """Whether somebody with this key (empty without keys) may talk to the learner now."""
        return self._allowed is None or self._allowed.allows(key)

    def authenticate(self) -> None:
        """Answer the question whether a key may connect, if there is one."""
        assert self._sockets.authenticator is not None
        try:
            request = self._sockets.authenticator.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        _, request_id, _, address, _, mechanism, *credentials = request
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        if self.allows(key):
            answer = (b"200", b"OK", key.encode())
        else:
            answer = (b"400", b"not in keys.allowed", b"")
            self._refuse_connection("unknown_key", f"{key} from {address.decode()}")
        self._sockets.authenticator.send_multipart([b"1.0", request_id, *answer, b""])

    def watch(self) -> None:
        """Count the connections that came to nothing."""
        for _ in range(_EVENTS_PER_TURN):
            try:
                event, value = read_event(self._sockets.monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if cause := self._handshakes.observe(event, value):
                self._refuse_connection(cause)

    def sender(self, identity: zmq.Frame, owner: str | None) -> str | None:
        """The key that a message came with (empty without keys), or None: it is refused.

        ``identity`` is the message's first frame; ``owner`` the key of the actor whose session it
        names, None if there is none.
        """
        if self._allowed is None:
            return ""
        try:
            key = str(identity.get("User-Id"))
        except zmq.ZMQError:
            key = ""
        if not self._allowed.allows(key):
            cause = "withdrawn_key"
        elif owner is not None and owner != key:
            # No answer: it would go to whoever has the routing id by now, maybe its owner.
            cause = "foreign_session"
        else:
            return key
        self.messages_refused[cause] += 1
        self._say("message", cause, key)
        return None

    def _refuse_connection(self, cause: str, who: str = "") -> None:
        self.connections_refused[cause] += 1
        self._say("connection", cause, who)

    def _say(self, what: str, cause: str, who: str) -> None:
        """Log a line, unless the same or too many others were logged within a minute."""
        if self._clock() >= self._forget_said_at:
            self._said.clear()
            self._forget_said_at = self._clock() + SAY_AGAIN_S
        line = f"{what} refused ({cause}): {_EXPLAINED[cause]}{who and f'; {who}'}"
        if line not in self._said and len(self._said) < _MAX_SAID:
            self._said.add(line)
            log.warning("%s", line)


class Handshakes:
    """Which connections ended before their handshake succeeded, from a ROUTER's events.

    A failed handshake is an event of its own, right before the connection's end, and does not say
    which connection's. What speaks no ZeroMQ at all just ends. Neither does a success say whose it
    is, only that it is one of those accepted and still open.
    """

    def __init__(self) -> None:
        self._open: set[int] = set()
        """File descriptors that may not have succeeded yet."""
        self._succeeded = 0
        """How many of them have, nobody knows which."""
        self._failure = ""

    def observe(self, event: int, value: int) -> str | None:
        """Note an event; returns the cause, if it is the end of a connection to be counted."""
        match event:
            case zmq.EVENT_ACCEPTED:
                self._open.add(value)
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._succeeded += 1
                self._settle()
            case zmq.EVENT_DISCONNECTED:
                return self._end(value)
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._failure = "unknown_key"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._failure = {
                    WRONG_LEARNER_KEY: "wrong_learner_key",
                    ENCRYPTION_MISMATCH: "encryption_mismatch",
                }.get(value, "other_protocol")
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._failure = "no_handshake"
        return None

    def _end(self, connection: int) -> str | None:
        failure, self._failure = self._failure, ""
        was_open = connection in self._open
        self._open.discard(connection)
        if not failure and was_open:
            if self._succeeded:
                self._succeeded -= 1
            else:
                failure = "no_handshake"
        self._settle()
        # An unknown key has been counted, with its name, when it was asked about.
        return failure if failure and failure != "unknown_key" else None

    def _settle(self) -> None:
        """Forget the open ones once all of them have succeeded."""
        if self._succeeded >= len(self._open):
            self._open.clear()
            self._succeeded = 0

"""The actor's end of its connection to the learner."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import zmq
import zmq.asyncio

from protocol.errors import BadMessage, PeerLost, Refused, one_line
from protocol.framing import Buffer, decode_to_actor, encode
from protocol.keys import ActorKeys
from protocol.messages import Error, Header, Hello, ToActor, Welcome
from protocol.sockets import ENCRYPTION_MISMATCH, connect_actor, read_event

log = logging.getLogger("actor")

HELLO_RETRY_S = 10.0
"""A hello, or its answer, may have been on a link that broke. Not sooner: an answer brings the
tokenizer, which takes its time on a slow link."""
_KEYS = "give this actor --key and --learner-key"
_NO_KEYS = "leave --key and --learner-key out"


class LearnerLink:
    """Sends and receives messages; knows when the learner was last heard of."""

    def __init__(
        self,
        url: str,
        session: str,
        keys: ActorKeys | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        self.session = session
        self._keys = keys
        self._clock = clock
        self._context = zmq.asyncio.Context()
        self._socket, self._monitor = connect_actor(self._context, url, session.encode(), keys)
        self._failed_handshakes = 0
        self._last_heard = clock()
        self.dropped_messages = 0

    @property
    def silence_s(self) -> float:
        """Seconds since the learner's last message."""
        return self._clock() - self._last_heard

    async def join(self, hello: Hello, timeout_s: float) -> tuple[Welcome, list[memoryview]]:
        """Say hello, which waits for the connection; raises `PeerLost`, or `Refused` with why."""
        welcome = asyncio.create_task(self._welcome(hello))
        watch = asyncio.create_task(self.watch())
        try:
            done, _ = await asyncio.wait(
                {welcome, watch}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            welcome.cancel()
            watch.cancel()
        if not done:
            raise PeerLost(self._why_silent(timeout_s))
        return await (watch if watch in done else welcome)

    async def _welcome(self, hello: Hello) -> tuple[Welcome, list[memoryview]]:
        said_at = -math.inf
        while True:
            if self._clock() - said_at >= HELLO_RETRY_S:
                said_at = self._clock()
                await self.send(hello)
            try:
                message, payloads = await asyncio.wait_for(self.receive(), HELLO_RETRY_S)
            except TimeoutError:
                continue
            if isinstance(message, Welcome):
                return message, payloads
            if isinstance(message, Error):
                why = one_line(message.message)
                raise Refused(f"the learner at {self.url} refuses this actor: {why}")

    async def watch(self) -> NoReturn:
        """Follow the handshakes; raises `Refused` when one failed after which ZeroMQ gives up."""
        while True:
            event, value = read_event(await self._monitor.recv_multipart())
            match event:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._failed_handshakes = 0
                case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                    # It connects again: a learner that is being stopped looks the same.
                    self._failed_handshakes += 1
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH if self._keys is not None:
                    raise Refused(
                        f"the learner at {self.url} does not know this actor's key "
                        f"{self._keys.own.public}: its .key file belongs in the learner's folder "
                        "keys.allowed"
                    )
                case _ if value == ENCRYPTION_MISMATCH and self._keys is not None:
                    raise Refused(f"the learner at {self.url} has no keys: {_NO_KEYS}")
                case _ if value == ENCRYPTION_MISMATCH:
                    raise Refused(f"the learner at {self.url} wants keys: {_KEYS}")
                case _:
                    raise Refused(f"what answers at {self.url} is no learner (error {value:#x})")

    def _why_silent(self, timeout_s: float) -> str:
        if not self._failed_handshakes:
            return (
                f"no learner answers at {self.url} within {timeout_s:g} s; is it running, and is "
                "the address right?"
            )
        # All that the other side's ZeroMQ lets us see of these is a closed connection.
        if self._keys is None:
            likely = f"does it want keys? {_KEYS}"
        else:
            likely = (
                f"is {self._keys.learner} (--learner-key) its key, as it says when it starts? If "
                f"it has no keys, {_NO_KEYS}"
            )
        return (
            f"the learner at {self.url} closed all {self._failed_handshakes} connections within "
            f"{timeout_s:g} s: {likely}"
        )

    async def send(self, header: Header, payloads: Sequence[Buffer] = ()) -> None:
        """Queue a message, or drop and count it when the queue is full.

        Heartbeats come again by themselves, groups are sent again until they are acknowledged.
        """
        try:
            await self._socket.send_multipart(encode(header, payloads), copy=False)
        except zmq.Again:
            self.dropped_messages += 1

    async def receive(self) -> tuple[ToActor, list[memoryview]]:
        """Wait for the next valid message; others are dropped and counted."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            try:
                message, payloads = decode_to_actor([frame.buffer for frame in frames])
            except BadMessage as error:
                self.dropped_messages += 1
                log.warning("bad message from the learner: %s", error)
                continue
            self._last_heard = self._clock()
            return message, payloads

    def close(self) -> None:
        """Close after what is queued was sent, or after the socket's linger time."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

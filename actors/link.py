"""The actor's end of its connection to the learner."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from protocol.errors import BadMessage, PeerLost, Refused, one_line
from protocol.framing import Buffer, decode_to_actor, encode
from protocol.messages import Error, Header, Hello, ToActor, Welcome
from protocol.sockets import connect_actor

log = logging.getLogger("actor")


class LearnerLink:
    """Sends and receives messages; knows when the learner was last heard of."""

    def __init__(self, url: str, session: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self._clock = clock
        self._context = zmq.asyncio.Context()
        self._socket = connect_actor(self._context, url, session.encode())
        self._last_heard = clock()
        self.dropped_messages = 0

    @property
    def silence_s(self) -> float:
        """Seconds since the learner's last message."""
        return self._clock() - self._last_heard

    async def join(self, hello: Hello, timeout_s: float) -> tuple[Welcome, list[memoryview]]:
        """Say hello, which waits for the connection; raises `PeerLost`, or `Refused` with why."""
        deadline = self._clock() + timeout_s
        await self.send(hello)
        while (left := deadline - self._clock()) > 0:
            try:
                message, payloads = await asyncio.wait_for(self.receive(), left)
            except TimeoutError:
                break
            if isinstance(message, Welcome):
                return message, payloads
            if isinstance(message, Error):
                why = one_line(message.message)
                raise Refused(f"the learner at {self.url} refuses this actor: {why}")
        raise PeerLost(
            f"no learner answers at {self.url} within {timeout_s:g} s; is it running, and is the "
            "address right?"
        )

    async def send(self, header: Header, payloads: Sequence[Buffer] = ()) -> None:
        """Queue a message. When the queue is full it is dropped and counted: heartbeats come
        again by themselves, groups are sent again until they are acknowledged."""
        try:
            await self._socket.send_multipart(encode(header, payloads), copy=False)
        except zmq.Again:
            self.dropped_messages += 1

    async def receive(self) -> tuple[ToActor, list[memoryview]]:
        """The next message that is valid."""
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
        self._socket.close()
        self._context.term()

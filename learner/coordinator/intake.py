"""The learner's socket thread: frames in, frames out.

`Access` decides who may talk to the learner, and the coordinator everything else.
"""

import logging
import os
import time
from threading import Lock
from typing import Any

import msgspec
import zmq

from learner.coordinator.access import Access
from learner.coordinator.coordinator import Coordinator
from learner.coordinator.pace import TICK_S
from learner.threads import GuardedThread
from protocol.errors import BadMessage
from protocol.framing import decode_to_learner, encode
from protocol.messages import Hello, Pong
from protocol.observability import Heartbeat
from protocol.sockets import LearnerSockets

log = logging.getLogger("learner")

_MESSAGES_PER_TURN = 200


class Intake:
    """Runs until `close`; a message in the outbox, or room for leases, ends its wait at once."""

    def __init__(
        self,
        sockets: LearnerSockets,
        access: Access,
        coordinator: Coordinator,
        heartbeat: Heartbeat,
    ) -> None:
        """Start the thread, which owns ``sockets`` from now on."""
        self._sockets = sockets
        self._socket = sockets.router
        self._access = access
        self._coordinator = coordinator
        self._heartbeat = heartbeat
        # ZeroMQ sockets belong to one thread, a pipe does not.
        self._pipe_lock = Lock()
        self._wake_read, write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._wake_write: int | None = write
        self._asleep = False
        """Whether it waits, or is about to, and nobody has woken it yet."""
        self._closing = False
        coordinator.outbox.wakes(self._wake)
        self._thread = GuardedThread("intake", self._serve)
        self._thread.start(coordinator.fail)

    def close(self) -> None:
        """End the thread and close the socket; once is enough, twice does no harm."""
        self._closing = True
        self._wake()
        self._thread.join()
        with self._pipe_lock:
            if self._wake_write is not None:
                os.close(self._wake_read)
                os.close(self._wake_write)
            self._wake_write = None

    def _wake(self) -> None:
        """End the wait, if there is one; callable from any thread, also after `close`.

        One byte is written for one wait, however many messages come in it. While the thread is at
        work it costs nothing, as what is in the outbox is sent before the next wait.
        """
        if not self._asleep:
            return
        with self._pipe_lock:
            if self._asleep and self._wake_write is not None:
                self._asleep = False
                os.write(self._wake_write, b"!")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        poller.register(self._sockets.monitor, zmq.POLLIN)
        if self._sockets.authenticator is not None:
            poller.register(self._sockets.authenticator, zmq.POLLIN)
        next_tick = 0.0
        try:
            while not self._closing:
                ready = self._wait(poller)
                if self._sockets.authenticator in ready:
                    self._access.authenticate()
                if self._sockets.monitor in ready:
                    self._access.watch()
                if self._socket in ready:
                    self._receive()
                if time.monotonic() >= next_tick:
                    self._coordinator.let_go(self._access.allows)
                    self._coordinator.tick()
                    self._heartbeat.beat()
                    next_tick = time.monotonic() + TICK_S
                self._coordinator.issue()
                self._send()
            self._send()
        finally:
            self._sockets.close()

    def _wait(self, poller: zmq.Poller) -> dict[Any, int]:
        """Return what is ready, at the latest after `TICK_S`."""
        self._asleep = True
        # In this order: what comes from here on wakes, what was before is seen.
        waiting = self._coordinator.has_room or len(self._coordinator.outbox) > 0
        busy = self._closing or waiting
        ready = dict(poller.poll(0 if busy else int(TICK_S * 1000)))
        self._asleep = False
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        return ready

    def _receive(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            # Any byte has a character there, so that an answer finds its way back.
            session = identity.bytes.decode("latin-1")
            key = self._access.sender(identity, self._coordinator.key_of(session))
            if key is None:
                continue
            try:
                message, payloads = decode_to_learner([frame.buffer for frame in frames])
            except BadMessage as error:
                self._coordinator.bad_message(session, error)
                continue
            if isinstance(message, Hello):
                # Whoever scrapes the actors' metrics must not be led to other machines.
                address = frames[0].get("Peer-Address")
                message = msgspec.structs.replace(message, metrics_host=address)
            self._coordinator.handle(session, message, payloads, key)

    def _send(self) -> None:
        outbox = self._coordinator.outbox
        while outbox:
            message = outbox.pop()
            frames = [message.session.encode("latin-1"), *encode(message.header, message.payloads)]
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:
                if not isinstance(message.header, Pong):
                    log.info("cannot reach an actor: %s", error.strerror)
                self._coordinator.unreachable(message.session)

"""The learner's socket thread: frames in, frames out.

Who may talk to the learner is the gate's decision, every other one the coordinator's.
"""

import contextlib
import logging
import os
import time
from threading import Lock, Thread

import msgspec
import zmq

from learner.coordinator.access import Access
from learner.coordinator.coordinator import Coordinator
from protocol.errors import BadMessage, TrainingError
from protocol.framing import decode_to_learner, encode
from protocol.messages import Hello, Pong
from protocol.observability import Heartbeat
from protocol.sockets import LearnerSockets

log = logging.getLogger("learner")

TICK_S = 0.1
_MESSAGES_PER_TURN = 200


class Intake:
    """Runs until `close`; `wake` makes it look at the coordinator at once."""

    def __init__(
        self,
        sockets: LearnerSockets,
        access: Access,
        coordinator: Coordinator,
        heartbeat: Heartbeat,
    ) -> None:
        self._sockets = sockets
        self._socket = sockets.router
        self._access = access
        self._coordinator = coordinator
        self._heartbeat = heartbeat
        # ZeroMQ sockets belong to one thread, a pipe does not.
        self._pipe_lock = Lock()
        self._wake_read, write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(write, False)
        self._wake_write: int | None = write
        self._closing = False
        self._thread = Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Callable from any thread, also after `close`."""
        # A full pipe has woken the thread already.
        with self._pipe_lock, contextlib.suppress(BlockingIOError):
            if self._wake_write is not None:
                os.write(self._wake_write, b"!")

    def close(self) -> None:
        """End the thread and close the socket; once is enough, twice does no harm."""
        self._closing = True
        self.wake()
        self._thread.join()
        with self._pipe_lock:
            if self._wake_write is not None:
                os.close(self._wake_read)
                os.close(self._wake_write)
            self._wake_write = None

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            log.exception("intake died")
            self._coordinator.fail(TrainingError(f"intake died: {error}"))
        finally:
            self._sockets.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        poller.register(self._sockets.monitor, zmq.POLLIN)
        if self._sockets.authenticator is not None:
            poller.register(self._sockets.authenticator, zmq.POLLIN)
        next_tick = 0.0
        while not self._closing:
            ready = dict(poller.poll(int(TICK_S * 1000)))
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                next_tick = 0.0
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
            self._send()
        self._send()

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
            message = outbox.popleft()
            frames = [message.session.encode("latin-1"), *encode(message.header, message.payloads)]
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:
                if not isinstance(message.header, Pong):
                    log.info("cannot reach an actor: %s", error.strerror)
                self._coordinator.unreachable(message.session)

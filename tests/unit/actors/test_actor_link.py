"""An actor that says hello over links that break, against a learner's socket that a test holds."""

import asyncio
from collections.abc import Iterator

import pytest
import zmq
import zmq.asyncio

from actors.link import HELLO_RETRY_S, LearnerLink
from actors.session import Session
from protocol.errors import PeerLost
from protocol.framing import decode_to_learner, encode
from protocol.messages import PROTOCOL_VERSION, Hello, Welcome
from tests.unit.factories import FakeClock

WELCOME = Welcome(run_id="run/1", actor={}, model_digest="m1", files=(), manifest=())


class FakeLearner:
    """Hears what actors say, and answers when it is told to."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.url = f"tcp://127.0.0.1:{port}"

    async def hears_hello(self) -> Hello:
        self._session, *frames = await asyncio.wait_for(self._socket.recv_multipart(), 5)
        message, _ = decode_to_learner(frames)
        assert isinstance(message, Hello)
        return message

    async def hears_nothing(self) -> bool:
        return not await self._socket.poll(200)

    async def welcomes(self) -> None:
        await self._socket.send_multipart([self._session, *encode(WELCOME)])

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def learner() -> Iterator[FakeLearner]:
    learner = FakeLearner()
    yield learner
    learner.close()


def make_session(learner: FakeLearner, clock: FakeClock) -> Session:
    """One that has joined before."""
    session = Session(LearnerLink(learner.url, "s"), clock)
    session._hello = Hello(protocol=PROTOCOL_VERSION, session="s", run_id=WELCOME.run_id)
    return session


def keep() -> None:
    """There are no leases to drop."""


async def test_a_hello_that_was_lost_on_a_cut_link_is_said_again(learner):
    clock = FakeClock()
    session = make_session(learner, clock)
    await session.join_again(keep)
    assert (await learner.hears_hello()).run_id == WELCOME.run_id
    # The learner answers "unknown session" to every message that was on its way.
    await session.join_again(keep)
    assert await learner.hears_nothing()
    clock.advance(HELLO_RETRY_S)
    await session.join_again(keep)
    await learner.hears_hello()
    session._link.close()


async def test_a_second_silence_is_answered_with_a_hello_at_once(learner):
    clock = FakeClock()
    session = make_session(learner, clock)
    await session.join_again(keep)
    await learner.hears_hello()
    session.joined_again(WELCOME)
    await session.join_again(keep)
    await learner.hears_hello()
    session._link.close()


async def test_the_first_hello_is_said_again_too(learner, monkeypatch):
    monkeypatch.setattr("actors.link.HELLO_RETRY_S", 0.2)
    link = LearnerLink(learner.url, "s")
    joining = asyncio.create_task(link.join(Hello(protocol=PROTOCOL_VERSION, session="s"), 5))
    await learner.hears_hello()
    await learner.hears_hello()
    await learner.welcomes()
    welcome, _ = await joining
    assert welcome.run_id == WELCOME.run_id
    link.close()


async def test_no_answer_at_all_is_an_error_in_time(learner):
    link = LearnerLink(learner.url, "s")
    with pytest.raises(PeerLost, match=r"no learner answers at .* within 0\.2 s"):
        await link.join(Hello(protocol=PROTOCOL_VERSION, session="s"), 0.2)
    link.close()

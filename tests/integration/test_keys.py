"""An encrypted learner, and all who should not get in: what they try, and what is told of it."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from protocol.framing import decode_to_actor, encode
from protocol.keys import ActorKeys, KeyPair, create_key, load_key, load_public_key
from protocol.messages import PROTOCOL_VERSION, Header, Hello, Weights, Welcome
from tests.integration.processes import (
    QUICK,
    RECIPE,
    Process,
    System,
    assert_books_balance,
    children_of,
    listening_addresses,
    metrics,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LONG_RUN = ("training.steps=100000", "deadlines.actor_timeout_s=10", "weights.timeout_s=2")


class Encrypted:
    """A learner with keys; ``good`` and ``second`` are listed, ``stranger`` is not."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.allowed = system.folder / "allowed"
        self.allowed.mkdir()
        for name in ("learner", "good", "second", "stranger"):
            create_key(system.folder / name)
        for name in ("good", "second"):
            self.add(name)

    @property
    def settings(self) -> tuple[str, ...]:
        folder = self.system.folder
        return (f"keys.secret={folder}/learner.key_secret", f"keys.allowed={self.allowed}")

    def start(self, *overrides: str) -> None:
        self.system.start_learner(*LONG_RUN, *self.settings, *overrides)

    def add(self, name: str) -> None:
        self.file(name).rename(self.allowed / f"{name}.key")

    def withdraw(self, name: str) -> None:
        (self.allowed / f"{name}.key").rename(self.system.folder / f"{name}.key")

    def file(self, name: str) -> Path:
        return self.system.folder / f"{name}.key"

    def key(self, name: str) -> KeyPair:
        return load_key(self.system.folder / f"{name}.key_secret")

    def actor(self, name: str, *arguments: str, learner: str = "learner") -> Process:
        secret = self.system.folder / f"{name}.key_secret"
        return self.system.start_actor(
            f"actor-{name}",
            *("--key", str(secret), "--learner-key", str(self.file(learner)), *arguments),
        )

    def refused(self, what: str) -> dict[str, int]:
        """Connections or messages, by cause."""
        counts: dict[str, int] = self.system.status()[f"{what}_refused"]
        return counts

    def handled(self) -> dict[str, float]:
        """Counters of all that handlers do with messages that are of no use."""
        names = ("gdpo_bad_messages_total", "gdpo_unknown_session_messages_total")
        found = metrics(self.system.get("/metrics"))
        return {name: found[name] for name in names}

    def joined(self) -> int:
        return self.system.learner.output.count(" joined: ")


class Peer:
    """A DEALER made by hand, which sends what it likes."""

    def __init__(self, url: str, session: str, keys: ActorKeys | None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.session = session
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IDENTITY, session.encode())
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        if keys is not None:
            self.socket.curve_publickey = keys.own.public.encode()
            self.socket.curve_secretkey = keys.own.secret.encode()
            self.socket.curve_serverkey = keys.learner.encode()
        self.socket.connect(url)

    def hello(self) -> None:
        self.send(Hello(protocol=PROTOCOL_VERSION, session=self.session, host=self.session))

    def send(self, message: Header) -> None:
        self.socket.send_multipart(encode(message))

    def receive(self) -> Header:
        header: Header = decode_to_actor(self.socket.recv_multipart())[0]
        return header

    def receive_until(self, kind: type[Header]) -> None:
        while not isinstance(self.receive(), kind):
            pass

    def heard(self) -> list[Header]:
        """What has come in by now."""
        messages = []
        while self.socket.poll(0):
            messages.append(self.receive())
        return messages

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@contextmanager
def peer(url: str, session: str, keys: ActorKeys | None) -> Iterator[Peer]:
    opened = Peer(url, session, keys)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def encrypted(system: System) -> Encrypted:
    return Encrypted(system)


def test_without_a_listed_key_nothing_reaches_a_handler(encrypted: Encrypted):
    """Counters and log tell of each attempt, and the actor with a key goes on."""
    system = encrypted.system
    encrypted.start()
    good = encrypted.actor("good")
    system.wait_for_step(1)
    host, port = "127.0.0.1", int(system.url.rpartition(":")[2])
    before = encrypted.handled()
    learner_key = encrypted.key("learner").public
    stranger = encrypted.key("stranger")

    def speak_plainly() -> None:
        with peer(system.url, "plain", None) as plain:
            plain.hello()
            wait_for(lambda: grown("encryption_mismatch", "no_handshake"), "the count")

    def send(data: bytes) -> None:
        with socket.create_connection((host, port)) as raw:
            raw.sendall(data)
            wait_for(lambda: grown("encryption_mismatch", "no_handshake"), "the count")

    def use_an_unlisted_key() -> None:
        with peer(system.url, "stranger", ActorKeys(stranger, learner_key)) as unlisted:
            unlisted.hello()
            wait_for(lambda: grown("unknown_key"), "the count")

    def use_a_wrong_learner_key() -> None:
        keys = ActorKeys(encrypted.key("good"), stranger.public)
        with peer(system.url, "wrong", keys) as wrong:
            wrong.hello()
            wait_for(lambda: grown("wrong_learner_key"), "the count")

    attempts: list[Callable[[], None]] = [
        speak_plainly,
        use_an_unlisted_key,
        use_a_wrong_learner_key,
        lambda: send(b"GET / HTTP/1.1\r\nHost: learner\r\n\r\n" * 100),
        lambda: send(b"\xff" + b"\x00" * 8 + b"\x7f\x03" + bytes(200)),
        lambda: send(os.urandom(10_000)),
        lambda: send(b"\x00" * 10_000),
    ]
    for attempt in attempts:
        counted = encrypted.refused("connections")

        def grown(*causes: str, counted: dict[str, int] = counted) -> bool:
            now = encrypted.refused("connections")
            return any(now.get(cause, 0) > counted.get(cause, 0) for cause in causes)

        attempt()
        encrypted.system.wait_for_groups(good)

    assert encrypted.joined() == 1
    assert encrypted.handled() == before
    output = system.learner.output
    assert f"(unknown_key): its key is not in keys.allowed; {stranger.public} from" in output
    for cause in ("encryption_mismatch", "wrong_learner_key", "no_handshake"):
        assert f"connection refused ({cause})" in output
    assert 'gdpo_connections_refused_total{cause="unknown_key"} 1.0' in system.get("/metrics")
    summary = system.summary_after_stop()
    assert summary["connections_refused"]["unknown_key"] == 1
    assert summary["bad_messages"] == 0
    assert summary["actors_lost"] == 0
    assert_books_balance(summary)


def test_an_actor_that_is_not_let_in_says_why(encrypted: Encrypted):
    system = encrypted.system
    encrypted.start()
    quick = ("--connect-timeout", "2")
    stranger = encrypted.actor("stranger", *quick)
    wrong = encrypted.actor("good", *quick, learner="stranger")
    plain = system.start_actor("plain", *quick)
    for process, words in (
        (stranger, f"does not know this actor's key {encrypted.key('stranger').public}"),
        (wrong, f"is {encrypted.key('stranger').public} (--learner-key) its key"),
        (plain, "give this actor --key and --learner-key"),
    ):
        assert process.wait(40) == 1, process.output
        [line] = [line for line in process.output.splitlines() if "error:" in line]
        assert words in line
        assert "Traceback" not in process.output
    assert encrypted.joined() == 0


def test_an_actor_with_keys_does_not_join_a_learner_without(encrypted: Encrypted):
    encrypted.system.start_learner(*LONG_RUN)
    actor = encrypted.actor("good", "--connect-timeout", "2")
    assert actor.wait(40) == 1
    assert "leave --key and --learner-key out" in actor.output
    assert encrypted.joined() == 0


def test_a_withdrawn_key_ends_its_actor_and_frees_its_leases(encrypted: Encrypted):
    system = encrypted.system
    encrypted.start()
    good, second = encrypted.actor("good"), encrypted.actor("second")
    wait_for(lambda: system.status()["actors_live"] == 2, "both actors")
    wait_for(lambda: (system.actor(second.pid) or {}).get("leases", 0) > 0, "leases to lose")
    encrypted.withdraw("second")
    wait_for(lambda: system.actor(second.pid) is None, "its end", 5)
    assert second.wait(20) == 1
    assert "its key has been withdrawn" in second.output
    encrypted.system.wait_for_groups(good)

    encrypted.add("second")
    back = encrypted.actor("second")
    encrypted.system.wait_for_groups(back)
    assert_books_balance(system.summary_after_stop())


def test_a_silent_actor_with_a_withdrawn_key_is_forgotten_and_its_messages_count(
    encrypted: Encrypted,
):
    """Stopped, it neither sends anything nor hears that it is to go."""
    system = encrypted.system
    encrypted.start("deadlines.actor_timeout_s=100")
    good, second = encrypted.actor("good"), encrypted.actor("second")
    for actor in (good, second):
        system.wait_for_groups(actor)
    before = encrypted.handled()
    second.signal(signal.SIGSTOP)
    encrypted.withdraw("second")
    withdrawn = time.monotonic()
    wait_for(lambda: system.actor(second.pid) is None, "its end", 5)
    assert time.monotonic() - withdrawn < 2.0
    encrypted.system.wait_for_groups(good)
    second.signal(signal.SIGCONT)
    wait_for(lambda: encrypted.refused("messages").get("withdrawn_key", 0) > 0, "the count", 15)
    assert second.wait(20) == 1
    assert f"(withdrawn_key): its key has been withdrawn; {encrypted.key('second').public}" in (
        system.learner.output
    )
    assert encrypted.handled() == before
    encrypted.system.wait_for_groups(good)


def test_a_listed_key_does_not_get_at_another_ones_session(encrypted: Encrypted):
    system = encrypted.system
    encrypted.start()
    good = encrypted.actor("good")
    learner_key = encrypted.key("learner").public
    owner_keys = ActorKeys(encrypted.key("good"), learner_key)
    thief_keys = ActorKeys(encrypted.key("second"), learner_key)
    with peer(system.url, "victim", owner_keys) as victim:
        victim.hello()
        victim.receive_until(Welcome)
        wait_for(lambda: system.status()["actors_live"] == 2, "both actors")
        before, joined = encrypted.handled(), encrypted.joined()
        with peer(system.url, "victim", thief_keys) as thief:
            thief.hello()
            wait_for(lambda: encrypted.refused("messages").get("foreign_session", 0), "the count")
            encrypted.system.wait_for_groups(good)
            # Weights that are offered to the victim go to whoever has its routing id by now.
            assert {type(message) for message in thief.heard()} <= {Weights}
    assert encrypted.handled() == before
    assert encrypted.joined() == joined
    words = "(foreign_session): it uses the session of an actor with another key; "
    assert words + thief_keys.own.public in system.learner.output


def test_open_to_other_machines_everything_goes_over_the_encrypted_socket(encrypted: Encrypted):
    """`gdpo run` gives its actors the keys; nothing but this socket and metrics listens."""
    system = encrypted.system
    settings = (
        *encrypted.settings,
        f"keys.actor={system.folder}/good.key_secret",
        "endpoints.bind=tcp://*:0",
    )
    run = system.gdpo("run", "run", str(RECIPE), *QUICK, *LONG_RUN, *settings)
    system.wait_until_it_listens(run)
    system.wait_for_step(5)
    assert {actor["route"] for actor in system.status()["actors"]} == {"stream"}
    learner = min(children_of(run.pid))
    assert sorted(listening_addresses(learner)) == ["0.0.0.0", "127.0.0.1"]
    assert load_public_key(system.run_folder / "learner.key") == encrypted.key("learner").public
    run.signal(signal.SIGINT)
    assert run.wait(30) == 130, run.output
    assert system.summary["weights"]["digest_mismatches"] == 0
    assert "weights_broadcast" not in system.summary["phase_seconds"]
    assert_books_balance(system.summary)


def test_gdpo_run_with_keys_but_none_for_its_actors_says_so(encrypted: Encrypted):
    run = encrypted.system.gdpo("run", "run", str(RECIPE), *QUICK, *encrypted.settings)
    assert run.wait(40) == 2
    assert "set keys.actor" in run.output

"""Key files, the list of allowed keys, and what the configuration demands of them."""

import os
import stat
from pathlib import Path

import pytest
import zmq

from learner.config.run import RunConfig
from learner.coordinator.access import Handshakes
from protocol.errors import ConfigError
from protocol.keys import (
    AllowList,
    KeyPair,
    create_key,
    load_actor_keys,
    load_key,
    load_public_key,
)
from protocol.sockets import ENCRYPTION_MISMATCH, WRONG_LEARNER_KEY
from tests.unit.factories import FakeClock, make_config


def make_key(folder: Path, name: str = "some") -> KeyPair:
    _, secret = create_key(folder / name)
    return load_key(secret)


# ---- Key files -----------------------------------------------------------------------------------


def test_a_new_key_can_be_read_again_and_its_secret_half_by_its_user_only(tmp_path):
    before = os.umask(0)
    try:
        public_file, secret_file = create_key(tmp_path / "node.1")
    finally:
        os.umask(before)
    assert (public_file.name, secret_file.name) == ("node.1.key", "node.1.key_secret")
    assert stat.S_IMODE(secret_file.stat().st_mode) == 0o600
    key = load_key(secret_file)
    assert load_public_key(public_file) == key.public
    assert key.secret not in public_file.read_text()
    assert key.secret not in repr(key)


@pytest.mark.parametrize("existing", ["node.key", "node.key_secret"])
def test_a_key_is_never_overwritten(tmp_path, existing):
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match=f"{existing} exists; choose another name"):
        create_key(tmp_path / "node")
    assert [file.name for file in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"


def test_a_key_in_a_folder_that_is_not_there_is_an_error_of_the_user(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*No such file"):
        create_key(tmp_path / "none" / "node")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_secret_key_that_others_may_read_is_refused_with_the_remedy(tmp_path, mode):
    _, secret_file = create_key(tmp_path / "node")
    secret_file.chmod(mode)
    with pytest.raises(ConfigError, match=f"{mode:04o}.*: chmod 600 {secret_file}"):
        load_key(secret_file)


def test_a_public_key_in_place_of_a_secret_one_and_the_reverse_are_told_apart(tmp_path):
    public_file, secret_file = create_key(tmp_path / "node")
    with pytest.raises(ConfigError, match="holds a public key only"):
        load_key(public_file)
    with pytest.raises(ConfigError, match="holds a secret key, which is not for the other side"):
        load_public_key(secret_file)


KEY = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no key file"),
        (b"\x00\xff\xfe", "is no key file"),
        (b"curve\npublic-key\n", "is no key file"),
        (b'public-key = "short"', "is damaged"),
        (b'public-key = "' + b"\xff" * 40 + b'"', "is damaged"),
        (f'public-key = "{KEY[:-1]}~"'.encode(), "is damaged"),
        (f'public-key = "{KEY}"\nsecret-key = "{KEY}"'.encode(), "its two halves"),
        (f'public-key = "{KEY}"\nsecret-key = ""'.encode(), "is damaged"),
        (b"x" * 100_000, "is no key file"),
    ],
)
def test_a_damaged_key_file_is_an_error_of_the_user(tmp_path, content, problem):
    file = tmp_path / "damaged.key_secret"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_key(file)
    assert "\n" not in str(caught.value)


def test_a_key_file_that_is_not_there_is_an_error_of_the_user(tmp_path):
    for file in (tmp_path / "none.key", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the key"):
            load_public_key(file)


def test_an_actor_has_both_keys_or_none(tmp_path):
    public, secret = create_key(tmp_path / "node")
    assert load_actor_keys(None, None) is None
    keys = load_actor_keys(secret, public)
    assert keys is not None
    assert keys.own.public == keys.learner
    for some in ((secret, None), (None, public)):
        with pytest.raises(ConfigError, match=r"give both or none: --key .* --learner-key"):
            load_actor_keys(*some)


# ---- The list of allowed keys --------------------------------------------------------------------


def test_keys_are_added_and_withdrawn_while_the_list_is_in_use(tmp_path):
    clock = FakeClock()
    first = make_key(tmp_path, "first")
    allowed = AllowList(tmp_path, clock)
    assert allowed.allows(first.public)
    second = make_key(tmp_path, "second")
    clock.advance(1.0)
    assert allowed.allows(second.public)
    (tmp_path / "first.key").unlink()
    clock.advance(1.0)
    assert not allowed.allows(first.public)
    assert allowed.allows(second.public)
    assert len(allowed) == 1


def test_the_folder_is_looked_at_no_more_than_once_a_second(tmp_path):
    clock = FakeClock()
    allowed = AllowList(tmp_path, clock)
    assert len(allowed) == 0
    key = make_key(tmp_path)
    clock.advance(0.9)
    assert not allowed.allows(key.public)
    clock.advance(0.1)
    assert allowed.allows(key.public)


def test_a_replaced_file_counts_even_with_the_old_size_and_time(tmp_path):
    clock = FakeClock()
    old = make_key(tmp_path, "node")
    allowed = AllowList(tmp_path, clock)
    assert allowed.allows(old.public)
    (tmp_path / "other").mkdir()
    new = make_key(tmp_path / "other", "node")
    times = (tmp_path / "node.key").stat()
    os.utime(tmp_path / "other" / "node.key", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "other" / "node.key").rename(tmp_path / "node.key")
    clock.advance(1.0)
    assert allowed.allows(new.public)
    assert not allowed.allows(old.public)


def test_a_damaged_file_allows_nobody_and_the_others_still_count(tmp_path, caplog):
    key = make_key(tmp_path)
    (tmp_path / "damaged.key").write_text("nothing")
    (tmp_path / "copied.key").write_text((tmp_path / "some.key_secret").read_text())
    (tmp_path / "folder.key").mkdir()
    (tmp_path / "link.key").symlink_to(tmp_path / "none")
    allowed = AllowList(tmp_path, FakeClock())
    assert len(allowed) == 1
    assert allowed.allows(key.public)
    assert not allowed.allows("")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert any("damaged.key is no key file" in line for line in lines)
    assert any("copied.key holds a secret key" in line for line in lines)


def test_without_the_folder_nobody_is_allowed_until_it_is_back(tmp_path, caplog):
    folder = tmp_path / "allowed"
    folder.mkdir()
    key, clock = make_key(folder), FakeClock()
    allowed = AllowList(folder, clock)
    assert allowed.allows(key.public)
    folder.rename(tmp_path / "gone")
    for _ in range(3):
        clock.advance(1.0)
        assert not allowed.allows(key.public)
    assert [record.getMessage() for record in caplog.records] == [
        f"nobody may connect: cannot list {folder}: No such file or directory"
    ]
    (tmp_path / "gone").rename(folder)
    clock.advance(1.0)
    assert allowed.allows(key.public)


# ---- The configuration ---------------------------------------------------------------------------

PUBLIC = "tcp://10.1.2.3:5555"
KEYS = {"secret": "learner.key_secret", "allowed": "allowed"}


def configure(bind: str, keys: dict[str, str] | None = None, **weights: object) -> RunConfig:
    return make_config(endpoints={"bind": bind}, keys=keys or {}, weights=weights)


@pytest.mark.parametrize(
    ("bind", "keys", "weights", "collective"),
    [
        ("tcp://127.0.0.1:0", {}, {}, "127.0.0.1"),
        ("tcp://localhost:5555", {}, {}, "localhost"),
        ("tcp://127.0.0.1:5555", KEYS, {}, "127.0.0.1"),
        ("tcp://127.0.0.1:5555", {}, {"backend": "stream"}, None),
        ("tcp://127.0.0.1:5555", {}, {"address": "10.1.2.3"}, None),
        (PUBLIC, KEYS, {}, None),
        (PUBLIC, KEYS, {"backend": "gloo"}, "10.1.2.3"),
        ("tcp://*:5555", KEYS, {}, None),
        ("tcp://0.0.0.0:5555", KEYS, {"backend": "gloo", "address": "10.1.2.3"}, "10.1.2.3"),
        ("tcp://eth0:5555", KEYS, {"backend": "gloo", "address": "10.1.2.3"}, "10.1.2.3"),
    ],
)
def test_the_broadcast_leaves_this_machine_only_if_the_user_says_so(
    bind, keys, weights, collective
):
    assert configure(bind, keys, **weights).collective_address == collective


@pytest.mark.parametrize(
    ("bind", "keys", "weights", "problem"),
    [
        ("tcp://*:5555", {}, {}, "which needs keys: make them with gdpo keygen"),
        ("tcp://0.0.0.0:5555", {}, {}, "which needs keys"),
        (PUBLIC, {}, {}, "which needs keys"),
        ("tcp://eth0:5555", {}, {}, "which needs keys"),
        ("tcp://[::1]:5555", KEYS, {}, "IPv6 is not supported"),
        ("tcp://127.0.0.1:5555", {"secret": "s"}, {}, "set keys.secret and keys.allowed, or none"),
        ("tcp://127.0.0.1:5555", {"allowed": "a"}, {}, "set keys.secret and keys.allowed, or none"),
        ("tcp://127.0.0.1:5555", {"actor": "a"}, {}, "keys.actor needs keys.secret"),
        ("tcp://*:5555", KEYS, {"backend": "gloo"}, "set weights.address"),
        ("tcp://eth0:5555", KEYS, {"backend": "gloo"}, "set weights.address"),
        (PUBLIC, KEYS, {"backend": "gloo", "address": "0.0.0.0"}, "set weights.address"),
        (PUBLIC, KEYS, {"address": "eth0"}, "weights.address"),
    ],
)
def test_nothing_listens_beyond_this_machine_unguarded(bind, keys, weights, problem):
    with pytest.raises(ValueError, match=problem):
        configure(bind, keys, **weights)


def test_key_files_are_looked_at_before_a_run(tmp_path):
    allowed = tmp_path / "allowed"
    keys = {"secret": f"{tmp_path}/learner.key_secret", "allowed": str(allowed)}
    assert configure("tcp://127.0.0.1:0").load_keys() is None
    with pytest.raises(ConfigError, match=r"keys.allowed = .*: no such folder"):
        configure(PUBLIC, keys).load_keys()
    allowed.mkdir()
    with pytest.raises(ConfigError, match="cannot read the key"):
        configure(PUBLIC, keys).load_keys()
    learner = make_key(tmp_path, "learner")
    assert configure(PUBLIC, keys).load_keys() == learner
    make_key(tmp_path, "actor")
    keys["actor"] = f"{tmp_path}/actor.key_secret"
    with pytest.raises(ConfigError, match=r"is not in keys.allowed .* copy its .key file there"):
        configure(PUBLIC, keys).load_keys()
    (tmp_path / "actor.key").rename(allowed / "actor.key")
    assert configure(PUBLIC, keys).load_keys() == learner


# ---- Handshakes that failed ----------------------------------------------------------------------


def causes(*events: tuple[int, int]) -> list[str | None]:
    """What a sequence of events counts as, one by one, without those that count as nothing."""
    handshakes = Handshakes()
    return [cause for event in events if (cause := handshakes.observe(*event))]


ACCEPTED, ENDED = zmq.EVENT_ACCEPTED, zmq.EVENT_DISCONNECTED
SUCCEEDED = (zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)
PROTOCOL, SILENT = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
AUTH = (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)


@pytest.mark.parametrize(
    ("failure", "counted"),
    [
        ((PROTOCOL, WRONG_LEARNER_KEY), ["wrong_learner_key"]),
        ((PROTOCOL, ENCRYPTION_MISMATCH), ["encryption_mismatch"]),
        ((PROTOCOL, 0x10000012), ["other_protocol"]),
        ((SILENT, 32), ["no_handshake"]),
        (AUTH, []),
    ],
)
def test_a_connection_counts_once_by_the_failure_before_its_end(failure, counted):
    assert causes((ACCEPTED, 9), failure, failure, (ENDED, 9)) == counted


def test_a_connection_that_ends_without_any_handshake_counts():
    assert causes((ACCEPTED, 9), (ENDED, 9)) == ["no_handshake"]


def test_the_end_of_an_established_connection_counts_as_nothing():
    assert causes((ACCEPTED, 9), SUCCEEDED, (ENDED, 9)) == []
    assert causes((ACCEPTED, 9), (ACCEPTED, 10), SUCCEEDED, SUCCEEDED, (ENDED, 10)) == []
    assert causes((ENDED, 9)) == []


def test_garbage_counts_beside_connections_that_succeed():
    """Nobody knows which of the two succeeded until the other one failed."""
    events = [(ACCEPTED, 9), (ACCEPTED, 10), SUCCEEDED, (SILENT, 11), (ENDED, 9), (ENDED, 10)]
    assert causes(*events, (ACCEPTED, 9), (ENDED, 9)) == ["no_handshake", "no_handshake"]

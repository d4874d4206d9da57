"""Malformed messages through the whole learner: refused, counted, and the next good one works."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from unittest import mock

import msgpack
import msgspec
import pytest

from learner.coordinator.admission import MAX_CHECKS_GOING_ON
from protocol.errors import BadMessage
from protocol.framing import MAX_FRAMES, Buffer, decode_to_actor, encode
from protocol.groups import pack_group
from protocol.messages import (
    Ack,
    Error,
    Failed,
    Goodbye,
    GroupHeader,
    WeightsChunk,
    WeightsPull,
    WeightsReady,
)
from tests.unit.factories import Cluster, joined, make_group, make_snapshot
from tests.unit.learner.coordinator.test_self_check import PASSED, checked_cluster
from tests.unit.protocol.test_framing import BAD_HEADERS
from tests.unit.protocol.test_groups import BAD_FRAMES
from tests.unit.wire_examples import FRAMES

HUGE = 2**64 - 1
LONG = "x" * 10_000
NO_TEXT = ("", "a\nb", "a\x1b[2Jb", "a\x00", "\u202eabc", LONG)
"""What is no name: empty, or with what forges a line of a log, clears a terminal, turns text."""


def changed(name: str, **changes) -> list[bytes]:
    """A good message with other fields; None removes one."""
    header, *payloads = (bytes(frame) for frame in FRAMES[name])
    fields = msgpack.unpackb(header) | changes
    fields = {key: value for key, value in fields.items() if value is not None}
    return [msgpack.packb(fields), *payloads]


# ---- Messages that are none --------------------------------------------------------------------

BAD_VALUES: dict[str, list[dict[str, Any]]] = {
    "hello": [
        *({"session": text} for text in (*NO_TEXT, "a b", "é")),
        *({"host": text} for text in NO_TEXT[1:]),
        *({"run_id": text} for text in NO_TEXT[1:]),
        *({"model_digest": text} for text in NO_TEXT[1:]),
        *({"metrics_host": text} for text in NO_TEXT[1:]),
        *({"metrics_port": port} for port in (-1, 65_536, HUGE, "80")),
        *({"protocol": number} for number in (-1, HUGE, "1", 1.0)),
        {"pid": -1},
    ],
    "group": [
        *({"lease": lease} for lease in (-1, -(2**63), HUGE, 2**63, "3", 3.0, [3])),
        *({"finish": f} for f in (["stop", "eos"], ["stop", 1], "stop", cast(Any, {}))),
        *({"reward_names": names} for names in ([b"format"], [1, 2], "format", [["format"]])),
        *({"generation_seconds": s} for s in (math.nan, math.inf, -math.inf, -1.0, 1e300)),
        *({"reward_seconds": s} for s in (math.nan, math.inf, -1e-9, 1e300)),
        {"sizes": [8, 8, 20, 20, 24]},
        {"sizes": [8, 8, 20, 20, 24, 16, 0]},
        {"sizes": [8, 8, 20, 20, 24, -16]},
        {"sizes": [8, 8, 20, 20, 24, HUGE]},
        {"sizes": [0] * MAX_FRAMES},
        {"sizes": [HUGE] * 10_000},
    ],
    "failed": [
        *({"lease": lease} for lease in (-1, HUGE)),
        *({"cause": cause} for cause in (b"x", 1, ["x"])),
    ],
    "status": [
        *({"sequence": number} for number in (-1, HUGE)),
        *({"version": version} for version in (-2, 2**31, HUGE)),
        *({"capacity": capacity} for capacity in (65_537, HUGE)),
        *({"leases": leases} for leases in ([-1], [HUGE], 3, ["1"], [1] * 10_000)),
        *({"heard": number} for number in (-2, HUGE)),
        *({"tokens_generated": number} for number in (-1, HUGE, 1e9)),
        {"uptime_seconds": 1e300},
    ],
    "weights_pull": [
        *({"version": version} for version in (-1, 2**31, 1 << 40, HUGE)),
        *({"chunk": chunk} for chunk in (-1, HUGE)),
        *({"base": base} for base in (-1, 2**31, HUGE)),
    ],
    "weights_ready": [
        *({"version": version} for version in (-1, 2**31)),
        *({"digest": text} for text in NO_TEXT[1:]),
        *({"route": route} for route in ("pigeon", "", 1)),
        *({"load_seconds": seconds} for seconds in (math.inf, -1.0)),
    ],
    "goodbye": [{"cause": {"a": 1}}],
}
MALFORMED = {
    **{f"a header that is {what}": [header] for what, header in BAD_HEADERS.items()},
    **{
        f"{name} with {str(change)[:60]} ({number})": changed(name, **change)
        for name, changes in BAD_VALUES.items()
        for number, change in enumerate(changes)
    },
    **{
        f"{name} from a learner": [bytes(frame) for frame in FRAMES[name]]
        for name in ("welcome", "lease", "ack", "weights", "weights_chunk", "pong", "drain")
    },
    "no frame": [],
    "only an empty frame": [b""],
    "a hundred empty frames": [b""] * 100,
    "a good header after an empty frame": [b"", *FRAMES["status"]],
    "a frame more than declared": [*FRAMES["status"], b""],
    "a group without its payloads": [FRAMES["group"][0]],
    "a group with two payloads swapped": [FRAMES["group"][i] for i in (0, 1, 2, 5, 4, 3, 6)],
    "payloads in place of the header": FRAMES["group"][1:],
}


def assert_goes_on(cluster: Cluster, accepted: int = 0) -> None:
    """The actor ``a`` finishes a lease that it holds; whatever came before left no trace."""
    held = cluster.coordinator.leases.held_by("a")
    assert held
    assert len(cluster.buffer) == accepted
    assert cluster.finish("a", held[0].number).verdict == "accepted"
    assert cluster.buffer.counts.accepted == len(cluster.buffer) == accepted + 1
    assert all(books.balanced for books in cluster.coordinator.leases.counts.values())
    cluster.coordinator.raise_if_failed()


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_message_is_counted_answered_and_changes_nothing(frames):
    cluster = joined("a")
    before = cluster.coordinator.actors()[0]
    cluster.receive("a", frames)
    assert cluster.coordinator.counters.bad_messages == 1
    [error] = cluster.heard("a", Error)
    assert error.code == "bad_message"
    assert error.message.isprintable()
    assert len(error.message) < 1000
    [after] = cluster.coordinator.actors()
    assert (after.status, after.num_leases, after.version) == (before.status, 4, 0)
    assert_goes_on(cluster)


# ---- Groups that are none ----------------------------------------------------------------------


def with_frame(lease: int, index: int, frame: bytes) -> list[Buffer]:
    header, payloads = pack_group(make_group(lease))
    payloads[index] = frame
    return encode(header, payloads)


def with_header(lease: int, **changes: Any) -> list[Buffer]:
    header, payloads = pack_group(make_group(lease))
    return encode(msgspec.structs.replace(header, **changes), payloads)


def with_payloads(lease: int, payloads: list[Buffer]) -> list[Buffer]:
    header, _ = pack_group(make_group(lease))
    return encode(header, payloads)


# The run of these tests allows prompts of 8 tokens and has version 0.
BAD_GROUPS: dict[str, Callable[[int], list[Buffer]]] = {
    **{
        f"a frame with {what}": partial(with_frame, index=index, frame=frame)
        for what, (index, frame, _) in BAD_FRAMES.items()
        if what != "a prompt too long"
    },
    "no reward names": lambda lease: with_header(lease, reward_names=()),
    "reward names of another run": lambda lease: with_header(lease, reward_names=("a", "b")),
    "ten thousand reward names": lambda lease: with_header(lease, reward_names=("a",) * 10_000),
    "ten thousand finish reasons": lambda lease: with_header(lease, finish=("stop",) * 10_000),
    "no finish reasons": lambda lease: with_header(lease, finish=()),
    "a prompt over the limit": lambda lease: with_frame(lease, 0, bytes(4 * 9)),
    "a frame of a megabyte": lambda lease: with_frame(lease, 0, bytes(1 << 20)),
    "ten thousand lengths": lambda lease: with_frame(lease, 1, bytes(40_000)),
    "a million spans": lambda lease: with_frame(lease, 4, bytes(12_000_000)),
    "seven payloads": lambda lease: with_payloads(lease, [*FRAMES["group"][1:], b""]),
    "no payloads": lambda lease: with_payloads(lease, []),
}


@pytest.mark.parametrize("frames_for", BAD_GROUPS.values(), ids=BAD_GROUPS.keys())
def test_an_invalid_group_is_rejected_and_its_row_leased_again(frames_for):
    cluster = joined("a")
    [lease, *_] = cluster.leases("a")
    cluster.receive("a", frames_for(lease))
    [ack] = cluster.heard("a", Ack)
    assert (ack.lease, ack.verdict) == (lease, "rejected")
    assert cluster.coordinator.counters.bad_messages == 1
    assert cluster.coordinator.leases.counts["train"].failed == {"invalid_group": 1}
    assert_goes_on(cluster)


def test_the_tables_of_malformed_messages_are_long():
    print(f"{len(MALFORMED)} malformed messages and {len(BAD_GROUPS)} malformed groups")
    assert len(MALFORMED) >= 100
    assert len(BAD_GROUPS) >= 40


# ---- Valid messages at the wrong time ----------------------------------------------------------


def test_what_is_valid_but_not_true_is_refused_in_its_own_way():
    cluster = joined("a", "b")
    [lease, *_] = cluster.leases("a")
    [other, *_] = cluster.leases("b")
    for wrong in (other, 0, 99, 2**63 - 1):
        cluster.say("a", GroupHeader(**{**header_fields(), "lease": wrong}))
        cluster.say("a", Failed(lease=wrong, kind="prompt", cause="x"))
    assert [ack.verdict for ack in cluster.heard("a", Ack)] == ["rejected"] * 4
    for version, chunk, base in ((5, 0, None), (5, 0, 5), (0, 2**63 - 1, None), (0, 1, 7)):
        cluster.say("a", WeightsPull(version=version, chunk=chunk, base=base))
        assert [p for _, p in cluster.heard_with_payloads("a", WeightsChunk)] == [()]
    for session in ("b", "c"):
        cluster.hello("a", session=session)
        assert [error.code for error in cluster.heard("a", Error)] == ["refused"]
    assert cluster.coordinator.counters.bad_messages == 0
    assert cluster.finish("a", lease).verdict == "accepted"
    assert_goes_on(cluster, accepted=1)


def header_fields():
    header, _ = pack_group(make_group())
    return {name: getattr(header, name) for name in header.__struct_fields__}


@pytest.mark.parametrize("digest", ["", "0", "zz", "abc", "é" * 7, make_snapshot(1).digest])
def test_a_digest_that_is_none_is_a_wrong_digest(digest):
    cluster = joined("a")
    cluster.say("a", ready(digest=digest))
    assert cluster.coordinator.counters.digest_mismatches == 1
    assert cluster.coordinator.actors()[0].version == -1


def ready(**changes) -> WeightsReady:
    values = {"version": 0, "digest": "", "route": "stream", "receive_seconds": 0}
    return WeightsReady(**{**values, "load_seconds": 0, **changes})


# ---- What a hostile actor may not do to others -------------------------------------------------


def test_no_text_of_an_actor_forges_a_line_of_the_log(caplog):
    caplog.set_level(logging.INFO, logger="learner")
    cluster = joined("a", "b", training={"batch_groups": 8})
    evil = "x\n12:00:00 learner: all is well\x1b[2J\u2028" + LONG
    [lease, *_] = cluster.leases("a")
    cluster.say("a", Failed(lease=lease, kind="prompt", cause=evil))
    cluster.receive("a", [msgpack.packb({"type": "status", evil: 1})])
    cluster.clock.advance(5)
    cluster.receive("\x1b[2J\n", [msgpack.packb({"type": evil})])
    cluster.say("a", Goodbye(cause=evil))
    texts = [record.getMessage() for record in caplog.records]
    assert sum("all is well" in text for text in texts) == 2
    for text in texts:
        assert text.isprintable()
        assert len(text) < 1000


def test_a_flood_of_bad_messages_does_not_flood_the_log(caplog):
    cluster = joined("a")
    for _ in range(1000):
        cluster.receive("a", [b""])
    cluster.clock.advance(1.5)
    cluster.receive("a", [b""])
    lines = [record.getMessage() for record in caplog.records if "bad message" in record.message]
    assert len(lines) == 2
    assert lines[1].endswith("(number 1001)")
    assert cluster.coordinator.counters.bad_messages == 1001


def test_no_reported_duration_is_longer_than_the_actor_has_been_there():
    cluster = joined("a")
    cluster.clock.advance(7)
    [lease, *_] = cluster.leases("a")
    header, payloads = cluster.group_message(lease)
    header = msgspec.structs.replace(header, generation_seconds=1e12, reward_seconds=2.0)
    with mock.patch.object(cluster.phases, "actor") as counted:
        cluster.say("a", header, payloads)
        cluster.weights_ready("a")
        cluster.say("a", ready(digest=make_snapshot(0).digest, load_seconds=1e12))
    assert [call.args for call in counted.call_args_list] == [
        ("generate", 7.0),
        ("score", 2.0),
        ("weights_receive", 0.0),
        ("weights_load", 0.0),
        ("weights_receive", 0.0),
        ("weights_load", 7.0),
    ]


def test_actors_that_come_and_go_do_not_pile_up_checks():
    # Each waiting check keeps a snapshot of the weights alive.
    cluster, check = checked_cluster()
    for number in range(3 * MAX_CHECKS_GOING_ON):
        session = f"s{number}"
        cluster.join(session)
        for lease in cluster.leases(session):
            cluster.finish(session, lease)
        cluster.say(session, Goodbye(cause="x"))
    assert len(check.submitted) == MAX_CHECKS_GOING_ON
    cluster.join("good")
    assert cluster.leases("good") == []
    check.judge(PASSED)
    cluster.pass_time(0.1)
    assert len(cluster.leases("good")) == 1


def test_a_flood_of_hellos_leaves_one_actor_and_balanced_books():
    cluster = joined("a")
    for _ in range(1000):
        cluster.join("a")
    assert cluster.coordinator.num_live == 1
    [actor] = cluster.coordinator.actors()
    assert actor.num_leases == len(cluster.coordinator.leases.held_by("a")) == 4
    assert_goes_on(cluster)


# ---- What an actor believes of a learner -------------------------------------------------------

BAD_TO_ACTOR: dict[str, list[dict[str, Any]]] = {
    "welcome": [
        {"run_id": "a\nb"},
        {"files": ["a\x00.json"]},
        {"files": [1]},
        {"manifest": [["w", "float32", [-1]]]},
        {"manifest": [["w", "float32", [HUGE]]]},
        {"manifest": [["w", "float32"]]},
        {"actor": []},
    ],
    "lease": [
        {"lease": -1},
        {"row": []},
        {"row": {1: "prompt"}},
        {"seed": -1},
        {"num_rollouts": 0},
        {"num_rollouts": 65_537},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"temperature": -1.0},
        {"max_tokens": 0},
        {"max_tokens": 2**31},
        {"deadline_s": math.inf},
        {"deadline_s": math.nan},
        {"deadline_s": -1.0},
        {"prompt_id": "a\nb"},
        {"purpose": "profit"},
    ],
    "ack": [{"lease": -1}, {"verdict": "maybe"}],
    "weights": [
        {"version": -1},
        {"version": 2**31},
        {"num_bytes": -1},
        {"num_bytes": HUGE},
        {"epoch": -1},
        {"rank": -1},
        {"world_size": 1 << 40},
        {"store_port": 0x10000},
        {"bucket_bytes": -1},
        {"timeout_s": math.inf},
        {"timeout_s": 1e12},
        {"backend": "mpi"},
        *({"shared": path} for path in ("/etc/passwd", "/proc/1/fd/2\n", "/proc/x/fd/1", 7)),
    ],
    "weights_chunk": [
        {"version": -1},
        {"chunk": -1},
        {"chunk": HUGE},
        {"base": -1},
        {"encoding": "pickle"},
    ],
    "pong": [{"version": 2**31}],
    "error": [{"code": "whatever"}],
}


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, changes in BAD_TO_ACTOR.items() for change in changes],
    ids=str,
)
def test_an_actor_takes_no_malformed_message_either(name, change):
    assert decode_to_actor(changed(name))
    with pytest.raises(BadMessage):
        decode_to_actor(changed(name, **change))

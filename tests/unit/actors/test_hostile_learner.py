"""An actor and a learner that sends nonsense: one clear error, or the lease given up."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actors.engines.engine import UnusableRow
from actors.engines.model_files import write_model_files
from actors.leases import Leases
from actors.rollouts.single_turn import RolloutWorker
from actors.weights.broadcast import Collective
from actors.weights.receive_buffer import ReceiveBuffer
from actors.weights.receiver import WeightsReceiver
from protocol.errors import AsyncGdpoError, BadMessage, EngineError, brief, one_line
from protocol.messages import Lease, Weights
from protocol.weights import CHUNK_BYTES, MAX_TOTAL_BYTES, layout
from tests.unit.wire_examples import LEASE
from transfer.shared_memory import SharedMemory

CPU = torch.device("cpu")

# ---- The welcome -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/x.json",
        "a/b.json",
        "a\\b.json",
        "..json",
        ".json",
        "",
        "config.py",
        "model.bin",
        "a\x00.json",
        "a\n.json",
        "config.json\n",
        "ä.json",
        "x" * 5000 + ".json",
    ],
)
def test_no_file_of_a_welcome_has_a_name_that_is_no_plain_name(tmp_path, name):
    with pytest.raises(BadMessage, match="a file named"):
        write_model_files(tmp_path, [name], [memoryview(b"{}")])
    assert list(tmp_path.iterdir()) == []


def test_two_files_of_one_name_or_a_file_too_few_are_a_bad_message(tmp_path):
    content = memoryview(b"{}")
    for names, contents in ((["a.json"] * 2, [content] * 2), (["a.json"], [])):
        with pytest.raises(BadMessage):
            write_model_files(tmp_path, names, contents)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ([("w", "float32", (1 << 43,))], "bytes of weights"),
        ([("w", "float32", (2**62,) * 16)], "bytes of weights"),
        ([(f"w{i}", "float32", (1 << 40,)) for i in range(5)], "bytes of weights"),
        ([("w", "float32", (1,) * 17)], "17 dimensions"),
        ([("w", "float32", (-1,))], "negative size"),
        ([("w", "int8", (1,))], "of type int8"),
        ([("w", "float32", (1,))] * 2, "twice"),
    ],
)
def test_a_manifest_that_no_model_has_is_refused(manifest, problem):
    with pytest.raises(ValueError, match=problem):
        layout(manifest)
    assert layout([("w", "float32", (MAX_TOTAL_BYTES // 4,))])


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1",
    reason="this system promises any memory",
)
def test_weights_for_which_there_is_no_memory_are_an_error_of_the_engine():
    link = SimpleNamespace(url="tcp://127.0.0.1:5555")
    specs = layout([("w", "float32", (MAX_TOTAL_BYTES // 4,))])
    with pytest.raises(EngineError, match=f"no {MAX_TOTAL_BYTES} bytes"):
        WeightsReceiver(link, SimpleNamespace(pinned=False), specs, 1.0, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0},
        {"rank": 3},
        {"world_size": 0},
        {"bucket_bytes": 0},
        {"bucket_bytes": CHUNK_BYTES + 1},
        {"store_port": 0},
        {"timeout_s": 0.0},
    ],
)
def test_a_collective_that_cannot_be_is_left_at_once(changes):
    good = {"rank": 1, "world_size": 3, "store_port": 1, "bucket_bytes": CHUNK_BYTES}
    good |= {"timeout_s": 0.2}
    offer = Weights(version=1, num_bytes=8, digest="d", epoch=1, **{**good, **changes})
    turn = ReceiveBuffer(SharedMemory(8), layout([("w", "float32", (2,))])).begin(1)
    # What is raised makes the receiver pull the version instead.
    with pytest.raises((ValueError, AsyncGdpoError)):
        Collective("tcp://127.0.0.1:5555", CPU).receive(offer, turn)


# ---- Leases ------------------------------------------------------------------------------------


class Tokenizer:
    def __call__(self, text):
        return {"input_ids": [1] * len(text)}

    def apply_chat_template(self, messages, **_):
        return [1, 2] if isinstance(messages[0], dict) else [[1, 2]]


def worker() -> RolloutWorker:
    return RolloutWorker(None, Tokenizer(), None, max_prompt_tokens=8, max_tokens=16)  # type: ignore[arg-type]


def lease(**changes) -> Lease:
    fields = {name: getattr(LEASE, name) for name in LEASE.__struct_fields__}
    return Lease(**{**fields, **changes})


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": None},
        {"prompt": 5},
        {"prompt": {}},
        {"prompt": {"role": "user"}},
        {"prompt": []},
        {"prompt": ["hi"]},
        {"prompt": [[{"role": "user", "content": "hi"}]]},
        {"prompt": b"hi"},
        {"prompt": ""},
        {"prompt": "x" * 9},
    ],
    ids=str,
)
async def test_a_row_without_a_usable_prompt_is_given_up(row):
    with pytest.raises(UnusableRow):
        await worker().roll_out(lease(row=row))


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [("", "no tokens: the tokenizer"), ("x" * 9, r"9 tokens; sampling\.max_prompt_tokens is 8")],
)
async def test_a_prompt_that_is_too_long_or_of_unknown_words_says_so(prompt, cause):
    with pytest.raises(UnusableRow, match=cause):
        await worker().roll_out(lease(row={"prompt": prompt}))


async def test_a_lease_over_the_runs_max_tokens_is_given_up():
    with pytest.raises(UnusableRow, match=r"2147483647 tokens; sampling\.max_tokens is 16"):
        await worker().roll_out(lease(max_tokens=2**31 - 1))


async def test_a_lease_that_comes_twice_or_beyond_all_capacity_is_not_taken(monkeypatch):
    monkeypatch.setattr("actors.leases.MAX_LEASES", 2)
    leases = Leases(None, None, asyncio.Event())  # type: ignore[arg-type]
    taken = []

    async def roll_out(lease, _):
        taken.append(lease.lease)
        await asyncio.sleep(0)

    leases._roll_out = roll_out  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as tasks:
        for number in (1, 1, 2, 3):
            leases.begin(lease(lease=number), worker(), tasks)
    assert taken == [1, 2]
    assert leases.at_hand == ()


# ---- Texts -------------------------------------------------------------------------------------


def test_a_text_of_a_peer_becomes_one_short_printable_line():
    assert one_line("plain: äöü, 日本") == "plain: äöü, 日本"
    assert one_line("a\nb\x1b[2J\u2028\u202e") == "a\\nb\\x1b[2J\\u2028\\u202e"
    assert one_line("x" * 400) == "x" * 297 + "..."
    assert brief(ValueError("first\nsecond")) == "first"
    assert brief(ValueError("a\x07b")) == "a\\x07b"

"""The journal: what it stores comes back, and nothing is acknowledged before."""

import os
import sqlite3
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from learner.prompts.work_queue import group_limits
from learner.replay.buffer import TrainingBatch
from learner.replay.journal import Journal, ReceivedGroup, wait_until_stored
from learner.replay.journal_reader import JournalReader, RecordedBatch, RecordedCommand
from protocol.errors import AsyncGdpoError, BadMessage, ConfigError, TrainingError
from protocol.framing import decode_to_learner, encode
from protocol.groups import Group, pack_group
from protocol.leases import OutstandingLease
from protocol.messages import GroupHeader
from tests.unit.factories import VOCAB, make_config, make_group, make_work

MAX_BYTES = 1 << 20
TIMEOUT_S = 10.0


class Writer:
    """A journal and what it told."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, *, start: bool = True) -> None:
        self.journal = Journal(path, max_bytes)
        self.stored: list[list[int]] = []
        """Prompt indices, as they came to be stored together."""
        self.failures: list[AsyncGdpoError] = []
        self.failed = Event()
        if start:
            self.start()

    def start(self) -> None:
        self.journal.start(self._on_stored, self._on_failure)

    def append(self, prompt_index: int, group: Group | None = None) -> Group:
        group = group or make_group(prompt_index + 100)
        held = OutstandingLease(group.lease, make_work(), "a", 0.0, 0.0)
        object.__setattr__(held.work, "prompt_index", prompt_index)
        header, payloads = pack_group(group)
        # As it comes from the network.
        received, frames = decode_to_learner(encode(header, payloads))
        assert isinstance(received, GroupHeader)
        self.journal.append(ReceivedGroup(held, group), received, frames)
        return group

    def settle(self) -> None:
        wait_until_stored(self.journal.prune((), -1), TIMEOUT_S)

    def _on_stored(self, arrivals) -> None:
        self.stored.append([received.lease.work.prompt_index for received in arrivals])

    def _on_failure(self, error: AsyncGdpoError) -> None:
        self.failures.append(error)
        self.failed.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def writer(path: Path):
    writer = Writer(path)
    yield writer
    writer.journal.close()


def limits():
    return group_limits(make_config(), VOCAB)


def make_batch(
    prompt_indices: tuple[int, ...], evicted: tuple[tuple[int, str], ...] = ()
) -> TrainingBatch:
    return TrainingBatch([], prompt_indices, evicted, prompt_indices)


def read(path: Path) -> JournalReader:
    return JournalReader.open(path)


# ---- What is stored comes back -----------------------------------------------------------------


def test_groups_come_back_bit_for_bit(path, writer):
    nan = float("nan")
    awkward = make_group(7, version=3, lengths=(8, 1), scores=[[nan, -0.0], [1e-45, 3.4e38]])
    object.__setattr__(awkward.rollouts[0], "spans", ((0, 1), (3, 2), (7, 3)))
    object.__setattr__(awkward, "missing", {})
    groups = {5: writer.append(5, awkward), 2: writer.append(2)}
    writer.settle()
    reader = read(path)
    assert reader.prompt_indices() == (2, 5)
    for prompt_index, group in groups.items():
        again = reader.group(prompt_index, limits())
        assert again.lease == group.lease
        assert again.scores.tobytes() == group.scores.tobytes()
        assert again.prompt_tokens.tobytes() == group.prompt_tokens.tobytes()
        for rollout, rollout_again in zip(group.rollouts, again.rollouts, strict=True):
            assert rollout_again.tokens.tobytes() == rollout.tokens.tobytes()
            assert rollout_again.logprobs.tobytes() == rollout.logprobs.tobytes()
            assert rollout_again.spans == rollout.spans
            assert rollout_again.finish == rollout.finish
    assert [(prompt_index, header.lease) for prompt_index, header, _ in reader.headers()] == [
        (2, 102),
        (5, 7),
    ]


def test_batches_and_commands_come_back_in_order(path, writer):
    writer.journal.batch(1, make_batch((3, 1), ((2, "stale"),)))
    writer.journal.command(2, {"format": {"weight": 0.5}})
    writer.journal.command(2, {"format": {"when": None}})
    writer.journal.batch(2, make_batch((2**40,)))
    writer.settle()
    assert read(path).batches() == [
        RecordedBatch(1, (3, 1), ((2, "stale"),)),
        RecordedBatch(2, (2**40,), ()),
    ]
    assert read(path).commands() == [
        RecordedCommand(1, 2, {"format": {"weight": 0.5}}),
        RecordedCommand(2, 2, {"format": {"when": None}}),
    ]


def test_what_is_pruned_is_gone_and_the_rest_is_not(path, writer):
    for prompt_index in range(4):
        writer.append(prompt_index)
    for step in (1, 2, 3):
        writer.journal.batch(step, make_batch((step,)))
    writer.journal.command(1, {"format": {"weight": 1.0}})
    wait_until_stored(writer.journal.prune([1, 3, 99], 2), TIMEOUT_S)
    assert read(path).prompt_indices() == (0, 2)
    assert [batch.step for batch in read(path).batches()] == [3]
    assert len(read(path).commands()) == 1
    with pytest.raises(ConfigError, match="no group of prompt 3"):
        read(path).group(3, limits())


def test_a_journal_that_is_opened_again_goes_on(path):
    first = Writer(path)
    first.append(1)
    first.journal.command(1, {"format": {"weight": 2.0}})
    first.journal.close()
    second = Writer(path)
    second.append(2)
    second.journal.command(4, {"format": {"weight": 3.0}})
    second.journal.close()
    assert read(path).prompt_indices() == (1, 2)
    assert [command.number for command in read(path).commands()] == [1, 2]


def test_closing_writes_what_waits(path):
    writer = Writer(path, start=False)
    writer.append(1)
    writer.start()
    writer.journal.close()
    writer.journal.close()
    assert read(path).prompt_indices() == (1,)
    assert writer.stored == [[1]]


def test_what_comes_after_closing_is_told_so_at_once(path):
    writer = Writer(path)
    writer.journal.close()
    with pytest.raises(TrainingError, match="is closed"):
        wait_until_stored(writer.journal.batch(1, make_batch((1,))), TIMEOUT_S)


# ---- Acknowledgements --------------------------------------------------------------------------


def test_everything_that_waits_is_one_transaction(path):
    writer = Writer(path, start=False)
    commits: list[str] = []
    writer.journal._database.set_trace_callback(commits.append)
    for prompt_index in range(50):
        writer.append(prompt_index)
    writer.journal.batch(1, make_batch((1, 2)))
    writer.start()
    writer.settle()
    assert commits.count("COMMIT") <= 2  # the 51, and perhaps `settle` alone
    assert writer.stored == [list(range(50))]
    writer.journal._database.set_trace_callback(None)
    writer.journal.close()


def test_a_group_is_on_disk_before_anybody_is_told(path):
    writer = Writer(path, start=False)
    seen: list[tuple[int, ...]] = []
    writer.journal.start(
        lambda arrivals: seen.append(read(path).prompt_indices()), writer._on_failure
    )
    writer.append(1)
    writer.settle()
    assert seen == [(1,)]
    writer.journal.close()


def test_an_error_of_the_store_settles_all_that_wait_and_acknowledges_nothing(path):
    writer = Writer(path, start=False)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE cuts")
    writer.append(1)
    batch = writer.journal.batch(1, make_batch((1,)))
    command = writer.journal.command(1, {})
    writer.start()
    for stored in (batch, command):
        with pytest.raises(TrainingError, match=r"cannot write the journal .*no such table"):
            wait_until_stored(stored, TIMEOUT_S)
    assert writer.failed.wait(TIMEOUT_S)
    assert writer.stored == []
    [failure] = writer.failures
    assert f"gdpo learner --resume {path.parent}" in str(failure)
    with pytest.raises(TrainingError, match="no such table"):
        wait_until_stored(writer.journal.prune([1], 1), TIMEOUT_S)
    writer.journal.close()
    assert read(path).prompt_indices() == ()


def test_a_mistake_of_who_is_told_ends_the_run_instead_of_hanging_it(path, caplog):
    writer = Writer(path, start=False)

    def mistake(arrivals):
        raise RuntimeError("oh")

    writer.journal.start(mistake, writer._on_failure)
    writer.append(1)
    with pytest.raises(TrainingError, match="oh"):
        wait_until_stored(writer.journal.batch(1, make_batch((1,))), TIMEOUT_S)
    assert writer.failed.wait(TIMEOUT_S)
    writer.journal.close()


def test_a_journal_that_does_not_write_in_time_is_an_error(path):
    writer = Writer(path, start=False)
    with pytest.raises(TrainingError, match="has not written for 0 s"):
        wait_until_stored(writer.journal.batch(1, make_batch((1,))), 0.01)
    writer.journal.close()


# ---- Size --------------------------------------------------------------------------------------


def large_group(prompt_index: int) -> Group:
    group = make_group(prompt_index)
    object.__setattr__(group, "prompt_tokens", np.zeros(20_000, dtype=np.int32))
    return group


def test_it_is_full_when_it_holds_too_much_and_not_any_more_when_that_is_deleted(path):
    writer = Writer(path, max_bytes=500_000)
    empty = writer.journal.size_bytes
    for prompt_index in range(10):
        writer.append(prompt_index, large_group(prompt_index))  # 80 kB each
    writer.settle()
    assert 800_000 < writer.journal.size_bytes < 1_000_000
    assert writer.journal.is_full
    wait_until_stored(writer.journal.prune(range(10), 0), TIMEOUT_S)
    assert writer.journal.size_bytes <= empty + 50_000
    assert not writer.journal.is_full
    writer.journal.close()


def test_guarantee_4_the_file_does_not_grow_for_ever(path, writer):
    sizes = []
    for step in range(60):
        for prompt_index in range(10 * step, 10 * step + 10):
            writer.append(prompt_index, large_group(prompt_index))
        writer.journal.batch(step, make_batch(tuple(range(10 * step, 10 * step + 10))))
        wait_until_stored(
            writer.journal.prune(range(10 * step - 10, 10 * step), step - 3), TIMEOUT_S
        )
        sizes.append(sum(file.stat().st_size for file in path.parent.iterdir()))
    # Ten groups of 80 kB, those before, and a log that begins anew every 4 MB or transaction.
    assert max(sizes[-10:]) <= 1.1 * max(sizes[10:20])
    assert max(sizes) < 20 << 20


def test_reading_group_by_group_does_not_hold_the_writer_up(path, writer):
    for prompt_index in range(3):
        writer.append(prompt_index, large_group(prompt_index))
    writer.settle()
    reader = read(path)
    headers = reader.headers()
    assert next(headers)[0] == 0
    for prompt_index in range(3, 300):
        writer.append(prompt_index, large_group(prompt_index))
        wait_until_stored(writer.journal.prune([prompt_index - 2], 0), TIMEOUT_S)
    # Those that are gone meanwhile are left out.
    assert [prompt_index for prompt_index, *_ in headers] == []
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 20 << 20


# ---- What cannot be read -----------------------------------------------------------------------


def test_a_reader_sees_what_is_written_while_the_writer_writes(path, writer):
    reader = read(path)
    for prompt_index in range(30):
        writer.append(prompt_index)
        writer.settle()
        assert reader.prompt_indices() == tuple(range(prompt_index + 1))


def test_a_journal_of_another_format_is_refused(path):
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 7")
    for opened in (lambda: Journal(path, MAX_BYTES), lambda: read(path)):
        with pytest.raises(ConfigError, match=r"no journal of this version \(format 7, not 2\)"):
            opened()


def test_what_is_no_journal_is_refused(path):
    with pytest.raises(ConfigError, match="no journal at"):
        read(path)
    path.write_bytes(b"something else, and long enough to be a header" * 100)
    with pytest.raises(ConfigError, match="cannot read the journal"):
        read(path)
    with pytest.raises(ConfigError, match="cannot write the journal"):
        Journal(path, MAX_BYTES)


def test_a_damaged_journal_is_one_clear_error(path):
    writer = Writer(path)
    for prompt_index in range(200):
        writer.append(prompt_index, large_group(prompt_index))
    writer.journal.close()
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(os.urandom(1 << 20))
    with pytest.raises((ConfigError, BadMessage)):
        for prompt_index in read(path).prompt_indices():
            read(path).group(prompt_index, limits())


def test_a_journal_in_a_folder_that_cannot_be_written_can_be_read(path, monkeypatch):
    writer = Writer(path)
    writer.append(1)
    writer.journal.close()
    real = sqlite3.connect

    def connect(name, **options):
        if "immutable" not in name:
            raise sqlite3.OperationalError("unable to open database file")
        return real(name, **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    assert read(path).prompt_indices() == (1,)

"""Guarantees 1, 2, 3 and 7 over any order of events, with a learner that is killed at any moment.

All parts are real but the trainer, which takes notes of what it is given, and the checkpoints,
which hold no weights. Time is in the test's hands, the journal's writer included.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import msgspec
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from learner.config.run import RunConfig
from learner.phases import Phases
from learner.prompts.work_queue import group_limits
from learner.recovery import history
from learner.recovery.checkpoints import Checkpoint
from learner.recovery.history import History
from learner.recovery.resume import Resumed
from learner.replay.buffer import TrainingBatch
from learner.replay.journal import Journal, wait_until_stored
from learner.run.saving import save
from learner.run_folder import RunFolder
from learner.state import RunState
from learner.training.policy import Policy
from learner.training.reward_settings import RewardSchedule, RewardSetting
from learner.training.signal import lack_signal
from protocol.config import RewardConfig
from protocol.errors import ConfigError, TrainingError
from protocol.messages import Ack, Failed, Lease
from tests.unit.factories import REWARDS, VOCAB, Cluster, make_config, make_snapshot

Step = tuple[int, tuple[int, ...], dict[str, Any]]
"""Its number, the prompt_indices that were trained on, and what the rewards counted."""


class SteppedJournal(Journal):
    """Writes when the test says so."""

    def start(self, on_stored, on_failure):
        self._on_stored, self._on_failure = on_stored, on_failure

    def write(self) -> None:
        entries, self._waiting = self._waiting, []
        if entries:
            self._store(entries)

    def be_killed(self) -> None:
        self._database.close()


@dataclass
class Run:
    """What outlives a learner: its folder, and what the outside world has seen."""

    path: Path
    config: RunConfig
    begun: list[Step] = field(default_factory=list)
    """The history as far as it goes, the batch in training included."""
    published: int = 0
    """Newest version that anybody has seen."""
    stored: set[int] = field(default_factory=set)
    acked: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)
    changes: list[Any] = field(default_factory=list)


class Life:
    """One learner of a run, from its start to its death."""

    def __init__(self, run: Run, *, resume: bool = True) -> None:
        self.run = run
        with mock.patch.object(history, "Journal", SteppedJournal):
            folder, phases = RunFolder(run.path), Phases(CollectorRegistry())
            self.history = History(folder, run.config, cast(Policy, None), phases)
        self.journal: SteppedJournal = cast(SteppedJournal, self.history.journal)
        self.cluster = Cluster(run.config, num_rows=7, journal=self.journal)
        self.coordinator, self.buffer = self.cluster.coordinator, self.cluster.buffer
        self.rewards = RewardSchedule(run.config.rewards, run.config.training.steps)
        self.batch: TrainingBatch | None = None
        self.unwritten: RunState | None = None
        self.replayed: list[Step] = []
        self.prompt_indices: dict[int, int] = {}
        if resume:
            self._resume()
        if self.journal is not None:
            self.journal.start(self._stored, self.coordinator.fail)
            self.rewards.record = self._record
        self.cluster.open_training()
        for session in "ab":
            self.join(session)

    def _resume(self) -> None:
        found = sorted(self.history.checkpoints.folder.iterdir())
        checkpoint = None
        if found:
            state = msgspec.json.decode((found[-1] / "state.json").read_bytes(), type=RunState)
            checkpoint = Checkpoint(found[-1], state.version, state)
        resumed = Resumed(
            self.run.config, checkpoint, self.journal, group_limits(self.run.config, VOCAB)
        )
        self.cluster.version = resumed.version
        resumed.replay(self.buffer, self.rewards, self._train_again, self.history.note_finished)
        resumed.restore_work(
            self.cluster.stream, self.cluster.work, self.coordinator.leases, self.buffer
        )
        self.coordinator.advance(self.cluster.version)
        self.cluster.snapshots.publish(make_snapshot(self.cluster.version))
        self._check_resumed(resumed)

    def _train_again(self, batch: TrainingBatch, setting: RewardSetting) -> None:
        self.cluster.version += 1
        self.replayed.append((self.cluster.version, batch.prompt_indices, setting.as_json()))

    # --- events -------------------------------------------------------------------------------

    def join(self, session: str, number: int = 0) -> None:
        self.cluster.join(session, capacity=4)
        self._hear()

    def arrive(self, session: str, number: int) -> None:
        if lease := self._lease(session, number):
            version = max(0, self.cluster.version - number % 3)
            # Of the fourth kind no reward varies; of the others the second never does.
            scores = [[1.0, 1.0]] * 2 if number == 4 else None
            self.cluster.say(
                session, *self.cluster.group_message(lease, version=version, scores=scores)
            )
            self._hear()

    def fail(self, session: str, number: int) -> None:
        if lease := self._lease(session, number):
            before = set(self._open())
            self.cluster.say(session, Failed(lease=lease, kind="prompt", cause="x"))
            self.run.given_up |= before - set(self._open()) - self.run.stored
            self._hear()

    def lose(self, session: str, number: int) -> None:
        self.coordinator.unreachable(session)
        self.join(session)

    def store(self, session: str, number: int) -> None:
        if self.journal is not None:
            self.journal.write()
        self._hear()

    def begin(self, session: str, number: int) -> None:
        config = self.run.config.training
        if self.batch is not None or self.cluster.version >= config.steps:
            return
        step, algorithm = self.cluster.version + 1, self.run.config.algorithm
        lack = partial(lack_signal, setting=self.rewards.upcoming(step), algorithm=algorithm)
        refills = algorithm.no_signal == "refill"
        self.batch = self.buffer.take(
            config.batch_groups,
            self.cluster.version,
            timeout_s=0,
            lack_signal=lack if refills else None,
        )
        if self.batch is not None:
            assert not (refills and any(lack(self.batch.groups)))
            self.history.begin(step, self.batch)
            setting = self.rewards.begin(step)
            self.run.begun.append((step, self.batch.prompt_indices, setting.as_json()))

    def publish(self, session: str, number: int) -> None:
        if self.batch is None:
            return
        self.store(session, number)
        self.history.wait()
        self.batch = None
        self.cluster.version += 1
        self.run.published = self.cluster.version
        self.coordinator.advance(self.cluster.version)
        self.cluster.snapshots.publish(make_snapshot(self.cluster.version))
        for each in "ab":
            self.cluster.weights_ready(each, self.cluster.version)
        self._hear()

    def train(self, session: str, number: int) -> None:
        """What usually happens."""
        for _ in range(2):
            self.arrive("a", number)
            self.arrive("b", 0)
        self.store(session, number)
        self.begin(session, number)
        self.publish(session, number)

    def checkpoint(self, session: str, number: int) -> None:
        self.copy_checkpoint(session, number)
        self.write_checkpoint(session, number)

    def command(self, session: str, number: int) -> None:
        if self.cluster.version + 1 < self.run.config.training.steps:
            self.rewards.command({REWARDS[number % 2]: {"weight": float(number)}})

    def ask(self, session: str, number: int) -> None:
        if self.cluster.version + 1 < self.run.config.training.steps:
            self.rewards.command({})

    def copy_checkpoint(self, session: str, number: int) -> None:
        if self.batch is None and self.cluster.version:
            prompts, leases = self.coordinator.state()
            self.unwritten = RunState(
                run_id="test",
                version=self.cluster.version,
                prompts=prompts,
                next_lease=self.coordinator.leases.next_lease,
                leases=leases,
                groups=self.buffer.state(),
                rewards=self.rewards.state(),
                batch_std=None,
                batch_std_setting=None,
                tokens_trained=0,
                tokens_generated=0,
                training_seconds=0.0,
                lag0_difference=None,
                counters={},
            )

    def write_checkpoint(self, session: str, number: int) -> None:
        state, self.unwritten = self.unwritten, None
        if state is None:
            return
        checkpoints = self.history.checkpoints
        path = checkpoints.path(state.version)
        if not path.exists():
            path.mkdir()
            (path / "state.json").write_bytes(msgspec.json.encode(state))
            for version in checkpoints.versions[:-2]:
                shutil.rmtree(checkpoints.path(version))
            self.history._prune()

    def kill(self, session: str, number: int) -> "Life":
        self.run.changes = self.rewards.changes
        if self.journal is not None:
            self.run.stored |= set(self.journal.prompt_indices())
            self.journal.be_killed()
        found = sorted(self.history.checkpoints.folder.iterdir())
        if len(found) > 1 and number % 2:
            # It turns out to be damaged.
            shutil.rmtree(found[-1])
        return Life(self.run)

    # --- what is checked ------------------------------------------------------------------------

    def check(self) -> None:
        assert all(books.balanced for books in self.coordinator.leases.counts.values())
        assert self.buffer.counts.balanced
        received = self.coordinator.leases.counts["train"].received
        assert received == self.buffer.counts.accepted
        uses = Counter(
            prompt_index
            for _, prompt_indices, _ in self.run.begun
            for prompt_index in prompt_indices
        )
        assert max(uses.values(), default=0) <= self.run.config.buffer.max_uses
        assert self.buffer.largest_staleness <= self.run.config.training.max_staleness
        open_indices = self._open()
        assert len(open_indices) == len(set(open_indices))
        assert not set(open_indices) & (self.run.acked | set(uses))

    def _check_resumed(self, resumed: Resumed) -> None:
        run, last = self.run, self.cluster.version
        if self.journal is None:
            run.begun = run.begun[:last]
            run.acked, run.stored = set(), set()
        else:
            # The history that was seen is made again, with at most the batch that was in training.
            assert self.replayed == run.begun[resumed.version : last]
            assert last >= run.published
            run.begun = run.begun[:last]
            self._check_groups()
            self._check_changes(last)
        self.check()

    def _check_groups(self) -> None:
        """None is lost, and each of the others is going to be leased exactly once."""
        run, books = self.run, self.buffer.counts
        assert books.accepted == len(run.stored)
        trained = {
            prompt_index for _, prompt_indices, _ in run.begun for prompt_index in prompt_indices
        }
        gone = run.stored - trained - {e.prompt_index for e in self.buffer._entries}
        assert len(gone) == books.evicted.total()
        assert run.acked <= run.stored
        retries = [work.prompt_index for work in self.cluster.work.retries]
        assert len(retries) == len(set(retries))
        missing = set(range(self.cluster.stream.next_prompt_index)) - run.stored
        assert missing - run.given_up <= set(retries) <= missing
        assert trained <= run.stored

    def _check_changes(self, last: int) -> None:
        expected = list(self.run.changes)
        # What the schedule said for a batch that was not begun, as far as anybody knows.
        while expected and expected[-1].source == "schedule" and expected[-1].from_step > last:
            expected.pop()
        changes = list(self.rewards.changes)
        while changes and changes[-1].source == "schedule" and changes[-1].from_step > last:
            changes.pop()
        assert [asdict(c) for c in changes] == [asdict(c) for c in expected]

    # --- details --------------------------------------------------------------------------------

    def _open(self) -> list[int]:
        """Prompt indices that are leased, or to be leased again."""
        prompts, _ = self.coordinator.state()
        return [*prompts.leased, *prompts.waiting]

    def _lease(self, session: str, number: int) -> int | None:
        held = sorted(held.number for held in self.coordinator.leases.held_by(session))
        return held[number % len(held)] if held else None

    def _stored(self, arrivals) -> None:
        new = {received.lease.work.prompt_index for received in arrivals}
        assert not new & self.run.stored
        self.run.stored |= new
        self.coordinator.stored(arrivals)

    def _record(self, from_step: int, updates: Any) -> None:
        stored = self.journal.command(from_step, updates)
        self.journal.write()
        wait_until_stored(stored, 0)

    def _hear(self) -> None:
        for held in self.coordinator.leases._held.values():
            self.prompt_indices[held.number] = held.work.prompt_index
        for session in "ab":
            self.cluster.heard(session, Lease)
            for ack in self.cluster.heard(session, Ack):
                if ack.verdict == "accepted":
                    self.run.acked.add(self.prompt_indices[ack.lease])


EVENTS = (
    *("train", "arrive") * 3,
    *("begin", "publish", "store", "command", "checkpoint", "kill") * 2,
    *("fail", "lose", "ask", "copy_checkpoint", "write_checkpoint"),
)
HISTORIES = st.lists(
    st.tuples(st.sampled_from(EVENTS), st.sampled_from("ab"), st.integers(0, 5)),
    min_size=20,
    max_size=80,
)
SCHEDULE = [{"from_step": step, "weight": step / 10} for step in (2, 3, 5, 8)]


def run_config(
    *,
    durability: str = "journal",
    max_uses: int = 1,
    no_signal: str = "keep",
    **training: Any,
) -> RunConfig:
    config = make_config(
        training={"steps": 30, "max_staleness": 2, **training},
        buffer={"durability": durability, "max_uses": max_uses},
        algorithm={"no_signal": no_signal},
    )
    rewards = [
        RewardConfig.model_validate(
            {"name": name, "function": f"tasks:{name}", "schedule": schedule}
        )
        for name, schedule in zip(REWARDS, (SCHEDULE, []), strict=True)
    ]
    return config.model_copy(update={"rewards": tuple(rewards)})


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def live(run: Run, events: list[tuple[str, str, int]]) -> Life:
    life = Life(run, resume=False)
    for name, session, number in events:
        life = getattr(life, name)(session, number) or life
        life.check()
    return life.kill("a", 0)


def batches(number: int) -> list[tuple[str, str, int]]:
    """Events in which so many batches of fresh groups are trained on."""
    one = [("arrive", "a", 0), ("arrive", "b", 0), ("store", "a", 0)]
    return [*one, ("begin", "a", 0), ("publish", "a", 0)] * number


CHECKPOINT = [("checkpoint", "a", 0)]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("max_uses", [1, 2, 3])
@settings(max_examples=60, deadline=None)
@example(events=[*batches(1), ("command", "a", 3), *CHECKPOINT, ("kill", "a", 0), *batches(1)])
@example(events=[*batches(3), *CHECKPOINT, *batches(3), *CHECKPOINT, *batches(2), ("kill", "a", 1)])
@example(
    events=[*batches(4), ("kill", "a", 0), *CHECKPOINT, *batches(2), *CHECKPOINT, ("kill", "a", 1)]
)
@given(events=HISTORIES)
def test_guarantees_1_2_3_and_7_hold_wherever_a_learner_with_a_journal_is_killed(events, max_uses):
    with tempfile.TemporaryDirectory() as name:
        run = Run(Path(name), run_config(max_uses=max_uses))
        life = live(run, events)
        event(f"{min(len(run.begun) // 3 * 3, 12)} steps or more")
        event(f"{'some' if life.buffer.counts.evicted else 'none'} evicted")


@pytest.mark.timeout(180)
@settings(max_examples=60, deadline=None)
@example(
    events=[("arrive", "a", 4), *batches(2), ("kill", "a", 0), *batches(1), *CHECKPOINT],
    max_uses=1,
)
@given(events=HISTORIES, max_uses=st.integers(1, 3))
def test_a_run_that_refills_groups_without_signal_has_one_history_too(events, max_uses):
    with tempfile.TemporaryDirectory() as name:
        run = Run(Path(name), run_config(max_uses=max_uses, no_signal="refill"))
        life = live(run, events)
        event(f"{'some' if life.buffer.counts.evicted['no_signal'] else 'none'} refilled")


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None)
@given(events=HISTORIES, max_uses=st.integers(1, 3))
def test_guarantees_1_3_and_7_hold_without_a_journal(events, max_uses):
    with tempfile.TemporaryDirectory() as name:
        config = run_config(durability="memory", max_uses=max_uses)
        live(Run(Path(name), config), events)


def test_a_run_that_was_trained_and_killed_again_and_again_has_one_history(folder: Path):
    run = Run(folder, run_config())
    again = [*batches(2), ("kill", "a", 0), ("kill", "a", 0)]
    life = live(run, [*again, *CHECKPOINT, *again, *CHECKPOINT, *again])
    assert [step for step, _, _ in run.begun] == [1, 2, 3, 4, 5, 6]
    assert life.cluster.version == 6


def test_a_learner_that_is_killed_before_its_first_step_leases_everything_again(folder: Path):
    run = Run(folder, run_config())
    life = live(run, [("arrive", "a", 0), ("store", "a", 0), ("arrive", "a", 0)])
    assert life.cluster.version == 0
    assert len(life.buffer) == len(run.stored) == 1
    assert run.acked == run.stored


def test_groups_that_overflow_after_a_resume_with_less_room_do_not_end_the_next_one(folder: Path):
    run = Run(folder, run_config())
    arrivals = [("arrive", session, 0) for session in "abab"]
    life = Life(run, resume=False)
    for name, session, number in [*arrivals, ("store", "a", 0)]:
        getattr(life, name)(session, number)
    assert len(life.buffer) == 4
    run.config = run.config.model_copy(
        update={"buffer": run.config.buffer.model_copy(update={"max_groups": 2})}
    )
    for _ in range(2):
        life = life.kill("a", 0)
        for name, session, number in batches(1):
            getattr(life, name)(session, number)
        life.check()
    assert [step for step, _, _ in run.begun] == [1, 2]
    life.kill("a", 0)


def test_fewer_steps_than_are_done_are_refused(folder: Path):
    run = Run(folder, run_config())
    live(run, batches(3))
    run.config = run_config(steps=2).model_copy(update={"rewards": make_config().rewards})
    with pytest.raises(ConfigError, match=r"training\.steps = 2, but the run is at step 3 already"):
        Life(run)


def test_a_journal_that_is_gone_is_no_reason_to_leave_prompts_out(folder: Path):
    run = Run(folder, run_config())
    life = Life(run, resume=False)
    for name, session, number in [*batches(1), *[("arrive", s, 0) for s in "ab"]]:
        getattr(life, name)(session, number)
    life.store("a", 0)
    buffered = set(life.buffer.unused_prompt_indices)
    assert buffered
    for name, session, number in CHECKPOINT:
        getattr(life, name)(session, number)
    life.journal.be_killed()
    for path in folder.glob("journal*"):
        path.unlink()
    run.stored, run.acked, run.published, run.changes = set(run.begun[0][1]), set(), 1, []
    life = Life(run)
    assert buffered <= set(life._open())


def test_a_journal_of_another_run_is_refused(folder: Path):
    run = Run(folder, run_config())
    live(run, [*batches(2), *CHECKPOINT, *batches(3), *CHECKPOINT, *batches(1)])
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match="checkpoint and journal are not of one run"):
        Life(run)


def test_no_checkpoint_is_made_of_a_batch_that_is_not_in_the_journal(folder: Path):
    """A run that went on from it would train on the groups of that batch again."""
    run = Run(folder, run_config())
    life = Life(run, resume=False)
    for name, session, number in batches(1)[:-1]:
        getattr(life, name)(session, number)
    parts: Any = SimpleNamespace(
        history=life.history,
        folder=RunFolder(folder),
        trainer=SimpleNamespace(version=1, in_step=False),
    )
    with mock.patch.object(history, "JOURNAL_TIMEOUT_S", 0.01), pytest.raises(TrainingError):
        save(parts)
    assert life.history.checkpoints.versions == []

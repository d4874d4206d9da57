"""What makes a run go on after its learner was killed: the journal, the checkpoints, and their use.

    training:   cut of step v+1 ──► journal ─┐
                step v+1 ────────────────────┴─► both done: version v+1 may be published
                every few steps: checkpoint ──► journal loses what the oldest checkpoint has used

    resume:     newest good checkpoint (v) ──► cuts v+1, v+2, ... of the journal are trained again
                ──► groups without a cut go into the buffer ──► the ports open

The batches that are trained again consist of the same groups in the same order, with the same
weights of the rewards, so they make the same versions (bit for bit where the arithmetic is
deterministic), and what actors sampled from those versions keeps its meaning. Without a journal the
run goes on from the checkpoint, and prompts whose groups were lost are leased again.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from learner.buffer import Cut, ReplayBuffer
from learner.checkpoints import Checkpoint, Checkpoints
from learner.config import RunConfig
from learner.data import PromptStream
from learner.journal import Journal, Stored
from learner.journal_reader import JournalReader, RecordedCut
from learner.policy import Policy
from learner.reward_settings import RewardSetting, RewardSettings
from learner.runlog import RunFolder
from learner.state import OpenTickets, RunState
from learner.work import WorkQueue
from protocol.errors import BadMessage, ConfigError
from protocol.groups import Group, GroupLimits
from protocol.leases import Books, LeaseBook

log = logging.getLogger("learner")

JOURNAL_TIMEOUT_S = 60.0


class History:
    """The writing side."""

    def __init__(self, folder: RunFolder, config: RunConfig, policy: Policy) -> None:
        """Raises `ConfigError`."""
        self._config = config
        self.journal = (
            Journal(folder.journal, config.buffer.journal_max_bytes)
            if config.buffer.durability == "journal"
            else None
        )
        self.checkpoints = Checkpoints(
            folder.checkpoints, policy, keep=config.checkpoints.keep, on_written=self._prune
        )
        self._last_cut: Stored | None = None
        self._lock = Lock()
        self._finished: deque[tuple[int, tuple[int, ...]]] = deque()
        """(step, tickets of the groups that nobody needs after it)."""

    def begin(self, step: int, cut: Cut) -> None:
        """A batch is going to be trained on."""
        self.note_finished(step, cut.finished)
        if self.journal is not None:
            self._last_cut = self.journal.cut(step, cut)

    def note_finished(self, step: int, tickets: tuple[int, ...]) -> None:
        """For `_prune`; without a journal nothing is pruned, and the list would only grow."""
        if self.journal is not None:
            with self._lock:
                self._finished.append((step, tickets))

    def wait(self) -> None:
        """Until what `begin` was told is on disk; raises `TrainingError` if it cannot be."""
        if self._last_cut is not None:
            self._last_cut.wait(JOURNAL_TIMEOUT_S)

    def is_due(self, version: int) -> bool:
        """Whether it is time for a checkpoint. One that is still being written is waited for only
        when the journal is full. Raises `TrainingError` if the one before could not be written."""
        self.checkpoints.raise_if_failed()
        if self.journal is not None and self.journal.is_full:
            return True
        every = self._config.checkpoints.every_steps
        return version % every == 0 and not self.checkpoints.is_writing

    def close(self) -> None:
        self.checkpoints.close()
        if self.journal is not None:
            self.journal.close()

    def _prune(self) -> None:
        """A checkpoint is written: forget what no kept one needs. One alone is no reason to: if it
        were damaged, everything would be."""
        versions = self.checkpoints.versions
        if self.journal is None or len(versions) < 2:
            return
        finished: list[int] = []
        with self._lock:
            while self._finished and self._finished[0][0] <= versions[0]:
                finished += self._finished.popleft()[1]
        # A group that may still be used again keeps the record of its first use.
        self.journal.prune(finished, versions[0] - self._config.learner.max_staleness - 1)


@dataclass(slots=True)
class Resumed:
    """Where a run goes on; `replay` first."""

    config: RunConfig
    checkpoint: Checkpoint | None
    journal: JournalReader | None
    limits: GroupLimits
    """Of the groups in the journal."""

    @property
    def state(self) -> RunState | None:
        return self.checkpoint.state if self.checkpoint else None

    @property
    def version(self) -> int:
        """Of the checkpoint."""
        return self.checkpoint.version if self.checkpoint else 0

    def replay(
        self,
        buffer: ReplayBuffer,
        rewards: RewardSettings,
        train: Callable[[Cut, RewardSetting], None],
        finished: Callable[[int, tuple[int, ...]], None] = lambda step, tickets: None,
    ) -> None:
        """Cut the journal's batches again and ``train`` on them, then fill the buffer.

        ``finished`` is told the tickets of groups that nobody needs after a step. Raises
        `ConfigError` if the journal and the checkpoint do not belong together, or the run is to end
        before where it is.
        """
        cuts = self.journal.cuts() if self.journal is not None else []
        before = [cut for cut in cuts if cut.step <= self.version]
        after = [cut for cut in cuts if cut.step > self.version]
        reached, steps = self.version + len(after), self.config.learner.steps
        if reached > steps:
            raise ConfigError(
                f"learner.steps = {steps}, but the run is at step {reached} already; give more"
            )
        if self.state is not None:
            buffer.restore(self.state.groups)
            rewards.restore(self.state.rewards, self.version)
        if self.journal is None:
            if self.state is not None:
                buffer.lose(self.state.groups)
            return
        expected = range(self.version + 1, reached + 1)
        if [cut.step for cut in after] != list(expected):
            raise ConfigError(
                f"{self.journal.path} has no record of the steps after {self.version}: checkpoint "
                "and journal are not of one run"
            )
        uses = Counter(ticket for cut in before for ticket in cut.tickets)
        ended = {ticket for ticket, n in uses.items() if n >= self.config.buffer.max_uses}
        ended |= {ticket for cut in before for ticket, _ in cut.evicted}
        alive = dict.fromkeys(t for t in self.journal.tickets() if t not in ended)
        finished(self.version, tuple(ended))
        commands = deque(self.journal.commands())

        def fetch(ticket: int) -> None:
            """Into memory, only when its turn comes."""
            if ticket in alive:
                del alive[ticket]
                buffer.put_back(self._group(ticket), ticket, uses[ticket])

        def command_up_to(step: int) -> None:
            while commands and commands[0].from_step <= step:
                command = commands.popleft()
                if command.number > rewards.num_commands:
                    rewards.command(command.updates)

        for cut in after:
            log.info("training on the batch of step %d again, from the journal", cut.step)
            for ticket in (*cut.tickets, *(ticket for ticket, _ in cut.evicted)):
                fetch(ticket)
            command_up_to(cut.step)
            setting = rewards.begin(cut.step)
            again = self._retake(buffer, cut)
            finished(cut.step, again.finished)
            train(again, setting)
            buffer.step_done()
        command_up_to(steps)
        for ticket in list(alive):
            fetch(ticket)

    def restore_work(
        self, stream: PromptStream, work: WorkQueue, leases: LeaseBook, buffer: ReplayBuffer
    ) -> None:
        """Lease again what did not come in, go on in the stream, and carry the books on."""
        tickets = self.state.tickets if self.state else OpenTickets()
        stored = set(self.journal.tickets()) if self.journal else set()
        # Tickets are leased in order: what is before one that came in was leased too.
        stream.next_ticket = max(tickets.next_ticket, max(stored, default=-1) + 1)
        since = range(tickets.next_ticket, stream.next_ticket)
        # What was in the buffer is in the journal, if there is one.
        open_tickets = {*tickets.leased, *tickets.waiting, *tickets.buffered, *since}
        for ticket in sorted(open_tickets - stored):
            work.retries.append(stream.work(ticket))
        if self.state is not None:
            for purpose, books in self.state.leases.items():
                arrived = stored.intersection(tickets.leased) if purpose == "train" else ()
                gone = books.outstanding - len(arrived)
                leases.books[purpose] = Books.after_loss(books.received, books.failed, gone)
            leases.next_lease = self.state.next_lease
        train = leases.books["train"]
        train.received = buffer.books.accepted
        train.leased = train.received + train.failed.total()

    def _retake(self, buffer: ReplayBuffer, cut: RecordedCut) -> Cut:
        try:
            return buffer.retake(cut.tickets, cut.evicted, cut.step - 1)
        except KeyError as error:
            raise ConfigError(
                f"a group of step {cut.step} is missing (ticket {error}): checkpoint and journal "
                "are not of one run"
            ) from error

    def _group(self, ticket: int) -> Group:
        assert self.journal is not None
        try:
            return self.journal.group(ticket, self.limits)
        except BadMessage as error:
            raise ConfigError(
                f"{self.journal.path}, ticket {ticket}: {error}; was the configuration changed?"
            ) from error

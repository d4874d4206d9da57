"""Guarantee 3 over any order of events: the books of leases, groups and evaluation balance.

And every evaluation is of one version.
"""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import PROTOCOL_VERSION, Ack, Failed, Goodbye, Lease, Pong
from tests.unit.factories import Cluster, make_config, make_work


class Chaos:
    """Turns drawn events into what actors, trainer and time do; checks the books after each."""

    def __init__(self) -> None:
        self.cluster = Cluster(make_config(training={"max_staleness": 2, "steps": 5}))
        self.cluster.open_training()
        self.received: dict[str, list[int]] = {session: [] for session in "abc"}
        self.accepted: Counter[int] = Counter()
        self.prompts: dict[int, str] = {}
        self.sent: dict[int, int] = {}
        """Version of the group that was sent last, by lease."""
        self.versions: dict[str, int] = {}
        """Version of the group that was accepted, by prompt."""
        self.evaluation = self.cluster.coordinator.start_evaluation({}, due=0)
        self.num_evaluated = self.num_evaluations = 0

    def join(self, session, number):
        self.cluster.join(session, capacity=number)

    def hello(self, session, number):
        self.cluster.hello(session, protocol=PROTOCOL_VERSION if number else 99)

    def follow(self, session, number):
        self.cluster.weights_ready(session, self.cluster.version, "wrong" if number == 3 else None)

    def heartbeat(self, session, number):
        self.cluster.status(session, capacity=number)

    def send_group(self, session, number):
        self._send(session, number)

    def send_group_of_its_own_version(self, session, number):
        actors = {actor.session: actor.version for actor in self.cluster.coordinator.actors()}
        self._send(session, number, version=max(0, actors.get(session, 0)))

    def send_invalid_group(self, session, number):
        self._send(session, number, lengths=(1, 9))

    def _send(self, session, number, **group):
        lease = ([0, *self.received[session]])[-1 - number % (len(self.received[session]) + 1)]
        self.sent[lease] = group.get("version", self.cluster.version)
        self.cluster.say(session, *self.cluster.group_message(lease, **group))

    def report_failure(self, session, number):
        for lease in self.received[session][-1 - number :][:1]:
            self.cluster.say(session, Failed(lease=lease, kind="prompt", cause="x"))

    def leave(self, session, number):
        self.cluster.say(session, Goodbye(cause="x"))

    def vanish(self, session, number):
        self.cluster.coordinator.unreachable(session)

    def let_time_pass(self, session, number):
        self.cluster.clock.advance((1, 6, 11, 61)[number])
        self.cluster.status(session)
        self.cluster.coordinator.tick()

    def train(self, session, number):
        self.cluster.train()

    def evaluate(self, session, number):
        if self.evaluation.done.is_set():
            self.num_evaluations += 1
            names = [f"h{self.num_evaluations}/{i}" for i in range(number)]
            works = [make_work(name, "eval") for name in names]
            version = self.cluster.version
            self.evaluation = self.cluster.coordinator.start_evaluation({"heldout": works}, version)
            self.num_evaluated = number

    def check(self):
        coordinator, books = self.cluster.coordinator, self.cluster.coordinator.leases.counts
        for session, leases in self.received.items():
            for lease in self.cluster.heard(session, Lease):
                leases.append(lease.lease)
                self.prompts[lease.lease] = lease.prompt_id
            for ack in self.cluster.heard(session, Ack):
                self.accepted[ack.lease] += ack.verdict == "accepted"
                if ack.verdict == "accepted":
                    self.versions[self.prompts[ack.lease]] = self.sent[ack.lease]
            self.cluster.heard(session, Pong)
        actors = {actor.session: actor for actor in coordinator.actors()}
        for session, actor in actors.items():
            assert actor.num_leases == len(coordinator.leases.held_by(session)) >= 0
        outstanding = {purpose: book.outstanding for purpose, book in books.items()}
        assert sum(actor.num_leases for actor in actors.values()) == sum(outstanding.values())
        assert all(book.balanced for book in books.values())
        assert max(self.accepted.values(), default=0) <= 1
        assert books["train"].received == self.cluster.buffer.counts.accepted
        assert self.cluster.buffer.counts.balanced
        # (2 + 1) batches of 2
        assert outstanding["train"] + len(self.cluster.buffer) <= 6
        evaluation = self.evaluation
        ended = sum(len(found.scores) + found.num_failed for found in evaluation.sets.values())
        assert ended + evaluation.num_missing == self.num_evaluated
        scored = [prompt for found in evaluation.sets.values() for prompt in found.scores]
        assert all(self.versions[prompt] == evaluation.version for prompt in scored)
        if not evaluation.done.is_set():
            out = sum(map(evaluation.wants, coordinator.leases.open_works("eval")))
            assert len(evaluation.waiting) + out == evaluation.num_missing > 0
        assert not any(actor.evaluates for actor in actors.values()) or not evaluation.done.is_set()


NAMES = [name for name in vars(Chaos) if not name.startswith("_") and name != "check"]
EVENTS = st.tuples(st.sampled_from(NAMES), st.sampled_from("abc"), st.integers(0, 3))


@settings(max_examples=100, deadline=None)
@given(st.lists(EVENTS, min_size=20, max_size=60))
def test_the_books_balance_whatever_happens(events):
    chaos = Chaos()
    chaos.join("a", 3)
    for name, session, number in events:
        getattr(chaos, name)(session, number)
        chaos.check()

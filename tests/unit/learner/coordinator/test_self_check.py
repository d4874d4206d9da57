"""The check of new actors: what it compares, what it says, and that nobody works before it."""

import copy
import dataclasses
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from learner.config.file import load_config
from learner.config.run import RunConfig
from learner.coordinator.self_check import CheckResult, SelfCheck
from learner.packing.choice import PLAIN
from learner.training.policy import Policy, load_policy, with_dtype
from learner.weights.offers import MAX_SNAPSHOTS_HELD
from learner.weights.snapshots import STILL_PULLED_S, Snapshot
from protocol.errors import TrainingError
from protocol.groups import Group, Rollout
from protocol.messages import Error, Failed, Lease, Weights, WeightsPull
from tests.unit.factories import Cluster, joined, make_snapshot, make_work, pack_alone

PROMPT = np.array([7, 20, 30], dtype=np.int32)
TOKENS = np.array([15, 9, 32, 16, 5, 8, 21, 1], dtype=np.int32)
PASSED = CheckResult(8, 1e-7, 1e-6)
FAILED = CheckResult(8, 0.5, 2.0, "the moon")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    recipe = Path(__file__).parents[4] / "examples" / "tool_calling_tiny.toml"
    return with_dtype(load_config(recipe, ["sampling.temperature=0.7"]))


@pytest.fixture(scope="module")
def policy(config: RunConfig) -> Policy:
    return load_policy(config)


@pytest.fixture
def check(policy: Policy, config: RunConfig) -> Iterator[SelfCheck]:
    check = SelfCheck(policy, config, (), PLAIN)
    yield check
    check.close()


def make_sequence(logprobs: np.ndarray, spans: tuple[tuple[int, int], ...] = ((0, 0),)) -> Group:
    rollout = Rollout(TOKENS, logprobs.astype(np.float32), spans, "stop")
    return Group(1, PROMPT, (rollout,), ("format",), np.zeros((1, 1), dtype=np.float32))


def model_logprobs(policy: Policy, temperature: float) -> np.ndarray:
    """By the definition, with the policy's own forward pass."""
    ids = torch.tensor(np.concatenate([PROMPT, TOKENS]))[None].long()
    with torch.no_grad():
        logits = policy.model(ids).logits[0, len(PROMPT) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(TOKENS)), TOKENS].numpy()


def snapshot_of(policy: Policy, version: int = 0) -> Snapshot:
    return pack_alone(version, policy.model, policy.specs)


def test_the_learners_own_log_probabilities_pass(check, policy):
    result = check.compare(
        make_sequence(model_logprobs(policy, temperature=0.7)), snapshot_of(policy)
    )
    assert result.num_tokens == len(TOKENS)
    assert result.largest_difference < 1e-5
    assert result.likely_cause == ""


def test_log_probabilities_without_the_temperature_are_recognised(check, policy):
    result = check.compare(make_sequence(model_logprobs(policy, 1.0)), snapshot_of(policy))
    assert "temperature 1, not at sampling.temperature = 0.7" in result.likely_cause


def test_other_differences_name_what_else_it_may_be(check, policy):
    logprobs = model_logprobs(policy, 0.7)
    logprobs[3] -= 0.5
    result = check.compare(make_sequence(logprobs), snapshot_of(policy))
    assert result.largest_difference == pytest.approx(0.5, abs=1e-4)
    assert result.mean_difference == pytest.approx(0.5 / len(TOKENS), abs=1e-4)
    assert "attention" in result.likely_cause
    assert "differ from the learner's by" in str(result)


def test_a_temperature_that_is_neither_the_set_one_nor_1_is_estimated(check, policy):
    result = check.compare(make_sequence(model_logprobs(policy, 0.6)), snapshot_of(policy))
    assert "as at a temperature of 0.6 instead of sampling.temperature = 0.7" in result.likely_cause


def test_the_message_has_the_limit_where_it_comes_from_and_the_setting(policy, config):
    actor = config.actor.model_copy(update={"dtype": "bfloat16"})
    check = SelfCheck(policy, config.model_copy(update={"actor": actor}), (), PLAIN)
    text = str(check.compare(make_sequence(np.full(len(TOKENS), -9.0)), snapshot_of(policy)))
    check.close()
    assert re.search(
        r"allowed are 0\.\d+ on average, as rounding to bfloat16 alone makes 0\.\d+; "
        r"admission\.check_limit sets another limit",
        text,
    )


def test_a_limit_of_the_users_is_named(policy, config):
    admission = config.admission.model_copy(update={"check_limit": 0.03})
    check = SelfCheck(policy, config.model_copy(update={"admission": admission}), (), PLAIN)
    result = check.compare(make_sequence(model_logprobs(policy, 1.0)), snapshot_of(policy))
    check.close()
    assert "(admission.check_limit = 0.03 on average)" in str(result)


def test_a_log_probability_that_is_no_number_does_not_pass(check, policy):
    logprobs = model_logprobs(policy, 0.7)
    logprobs[2] = np.nan
    assert check.compare(make_sequence(logprobs), snapshot_of(policy)).likely_cause


def test_only_tokens_of_the_snapshots_version_are_compared(check, policy):
    logprobs = model_logprobs(policy, 0.7)
    logprobs[5:] = -50.0
    group = make_sequence(logprobs, spans=((0, 3), (5, 4)))
    result = check.compare(group, snapshot_of(policy, version=3))
    assert (result.num_tokens, result.likely_cause) == (5, "")
    assert check.compare(group, snapshot_of(policy, version=9)).num_tokens == 0


# ---- The coordinator's side --------------------------------------------------------------------


class FakeCheck:
    """Judges when the test says so."""

    def __init__(self) -> None:
        self.works = [make_work(f"check-{i}", purpose="check") for i in range(3)]
        self.submitted: list[tuple[Group, Snapshot]] = []
        self._reports: list[Callable[[CheckResult], None]] = []

    def submit(self, group, snapshot, report) -> None:
        self.submitted.append((group, snapshot))
        self._reports.append(report)

    def spot_check(self, group, snapshot, report) -> None:
        self.submit(group, snapshot, report)

    def judge(self, result: CheckResult) -> None:
        self._reports.pop(0)(result)


def checked_cluster() -> tuple[Cluster, FakeCheck]:
    check = FakeCheck()
    cluster = Cluster(self_check=check)
    cluster.open_training()
    return cluster, check


def purposes(cluster: Cluster, session: str) -> list[str]:
    return [lease.purpose for lease in cluster.heard(session, Lease)]


def test_an_actor_gets_one_check_and_no_other_work_before_it_has_passed():
    cluster, check = checked_cluster()
    cluster.join("a")
    [lease] = cluster.heard("a", Lease)
    assert lease.purpose == "check"
    assert cluster.finish("a", lease.lease).verdict == "accepted"
    cluster.pass_time(1)
    assert purposes(cluster, "a") == []
    check.judge(PASSED)
    cluster.pass_time(1)
    assert set(purposes(cluster, "a")) == {"train"}
    assert cluster.coordinator.actors()[0].check_difference == 1e-6


def test_where_nobody_is_checked_an_actor_gets_work_at_once():
    cluster = joined("a")
    assert set(purposes(cluster, "a")) == {"train"}
    assert cluster.coordinator.actors()[0].check == "off"


def test_a_check_whose_weights_changed_before_its_first_token_is_done_again():
    cluster, check = checked_cluster()
    cluster.join("a")
    cluster.finish("a", *cluster.leases("a"))
    check.judge(CheckResult(0, 0.0, 0.0))
    cluster.pass_time(1)
    assert purposes(cluster, "a") == ["check"]


def test_an_actor_keeps_the_version_that_it_is_checked_with_and_then_catches_up():
    """However fast the learner is, and however slow the actor."""
    cluster, check = checked_cluster()
    cluster.hello("a")
    [announced] = cluster.heard("a", Weights)
    cluster.say("a", WeightsPull(version=announced.version, chunk=0))
    for version in range(1, 4):
        cluster.version = version
        cluster.coordinator.advance(version)
        cluster.clock.advance(2 * STILL_PULLED_S)
        cluster.status("a", capacity=0, version=-1)
        cluster.snapshots.publish(make_snapshot(version))
        assert cluster.coordinator.begin_push(version) == []
        cluster.coordinator.end_push()
    assert cluster.snapshots.kept(announced.version) is None
    cluster.weights_ready("a", version=announced.version)
    cluster.status("a")
    # Pushes leave it out.
    assert cluster.ready() == []
    assert cluster.heard("a", Weights) == []
    cluster.finish("a", *cluster.leases("a"), version=0)
    [(_, snapshot)] = check.submitted
    assert snapshot.version == 0
    check.judge(PASSED)
    assert [w.version for w in cluster.heard("a", Weights)] == [3]
    assert cluster.ready() == ["a"]


def test_an_actor_that_has_to_pull_a_newer_version_is_checked_with_that():
    cluster, check = checked_cluster()
    cluster.hello("a")
    cluster.version = 1
    cluster.coordinator.advance(1)
    cluster.snapshots.publish(make_snapshot(1))
    cluster.say("a", WeightsPull(version=0, chunk=0))
    cluster.weights_ready("a", version=1)
    cluster.status("a")
    cluster.finish("a", *cluster.leases("a"))
    [(_, snapshot)] = check.submitted
    assert snapshot.version == 1


def test_every_check_has_another_row_because_one_may_be_unusable():
    cluster, _ = checked_cluster()
    cluster.join("a")
    seen = []
    for _ in range(2):
        [lease] = cluster.heard("a", Lease)
        seen.append(lease.prompt_id)
        cluster.say("a", Failed(lease=lease.lease, kind="prompt", cause="too long"))
    assert seen == ["check-0", "check-1"]


def test_while_the_run_ends_no_check_is_leased():
    cluster, _ = checked_cluster()
    cluster.hello("a")
    cluster.coordinator.drain("done")
    cluster.weights_ready("a")
    cluster.status("a")
    assert cluster.leases("a") == []


def test_a_comparison_that_fails_ends_the_run_instead_of_never_ending(check, policy):
    group = make_sequence(model_logprobs(policy, 0.7))
    failures: SimpleQueue[Any] = SimpleQueue()
    broken = dataclasses.replace(snapshot_of(policy), packed=torch.zeros(3, dtype=torch.uint8))
    check.start(failures.put)
    check.submit(group, broken, report=failures.put)
    error = failures.get(timeout=20)
    assert isinstance(error, TrainingError)
    assert "admission.self_check=false leaves it out" in str(error)
    # The next one is judged all the same.
    check.submit(group, snapshot_of(policy), report=failures.put)
    assert failures.get(timeout=20).likely_cause == ""


def test_the_check_leaves_the_model_in_training_as_it_is(policy, config):
    """Its own model has another attention implementation where the policy's needs a GPU."""
    model = copy.copy(policy.model)
    model.config = copy.deepcopy(policy.model.config)
    model.config._attn_implementation = "flash_attention_2"
    SelfCheck(dataclasses.replace(policy, model=model), config, (), PLAIN).close()
    assert model.config._attn_implementation == "flash_attention_2"


def test_one_token_that_is_far_off_does_not_pass_by_its_mean(policy, config):
    admission = config.admission.model_copy(update={"check_limit": 0.03})
    check = SelfCheck(policy, config.model_copy(update={"admission": admission}), (), PLAIN)
    logprobs = model_logprobs(policy, 0.7)
    rollouts = []
    for rollout in range(16):
        values = logprobs.copy()
        values[0] -= 3.0 if rollout == 0 else 0.0
        rollouts.append(Rollout(TOKENS, values.astype(np.float32), ((0, 0),), "stop"))
    scores = np.zeros((16, 1), dtype=np.float32)
    result = check.compare(
        Group(1, PROMPT, tuple(rollouts), ("format",), scores), snapshot_of(policy)
    )
    check.close()
    # 3 / 128 tokens is below the limit, 3 itself is above 25 times the limit.
    assert result.mean_difference < 0.03
    assert result.likely_cause


def test_a_failed_check_lease_is_leased_again():
    cluster, _ = checked_cluster()
    cluster.join("a")
    [lease] = cluster.leases("a")
    cluster.say("a", Failed(lease=lease, kind="prompt", cause="no luck"))
    assert purposes(cluster, "a") == ["check"]
    books = cluster.coordinator.leases.counts["check"]
    assert (books.leased, books.failed.total(), books.outstanding) == (2, 1, 1)


def test_the_only_actor_failing_its_check_ends_the_run_with_the_figure():
    cluster, check = checked_cluster()
    cluster.join("a")
    cluster.finish("a", *cluster.leases("a"))
    check.judge(FAILED)
    [error] = cluster.heard("a", Error)
    assert error.code == "refused"
    assert "0.5 on average, 2 at most. The likely cause: the moon" in error.message
    with pytest.raises(TrainingError, match="the moon"):
        cluster.coordinator.raise_if_failed()


def test_beside_a_good_actor_a_bad_one_is_only_refused():
    cluster, check = checked_cluster()
    for session, result in (("a", PASSED), ("b", FAILED)):
        cluster.join(session)
        [lease] = [m for m in cluster.heard(session, Lease) if m.purpose == "check"]
        cluster.finish(session, lease.lease)
        check.judge(result)
    cluster.coordinator.raise_if_failed()
    assert [actor.session for actor in cluster.coordinator.actors()] == ["a"]


def test_a_verdict_on_an_actor_that_has_left_changes_nothing():
    cluster, check = checked_cluster()
    cluster.join("a")
    cluster.finish("a", *cluster.leases("a"))
    cluster.pass_time(20)
    assert cluster.coordinator.num_live == 0
    check.judge(FAILED)
    cluster.coordinator.raise_if_failed()


def test_check_groups_are_not_trained_on():
    cluster, check = checked_cluster()
    cluster.join("a")
    cluster.finish("a", *cluster.leases("a"))
    check.judge(PASSED)
    assert len(cluster.buffer) == cluster.buffer.counts.accepted == 0


def test_actors_that_still_start_keep_no_snapshots_and_those_that_pull_only_some():
    """Starting an engine takes minutes, in which there are many versions."""
    cluster, _ = checked_cluster()
    kept = []
    for version in range(1, 30):
        session = f"s{version}"
        cluster.hello(session)
        snapshot = make_snapshot(version)
        cluster.snapshots.publish(snapshot)
        kept.append(weakref.ref(snapshot.packed))
        if version > 10:
            cluster.say(session, WeightsPull(version=version, chunk=0))
        cluster.clock.advance(1)
        cluster.heard(session, Weights)
    del snapshot
    cluster.forget_messages()
    assert sum(ref() is not None for ref in kept[:10]) == 0
    # The newest, and the oldest that was pulled lately, are there in any case.
    assert sum(ref() is not None for ref in kept) <= MAX_SNAPSHOTS_HELD + 2

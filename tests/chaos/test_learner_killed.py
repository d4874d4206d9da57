"""The learner is killed at named points; the run that goes on is the one that would have been.

With toy actors and a lag of 0, generation and training take turns, so that a run without failures
is a pure function of its configuration: its losses are what those of a killed run must be.
"""

import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from learner.recovery.checkpoints import newest
from learner.replay.journal_reader import JournalReader
from tests.chaos.audit import of
from tests.chaos.record import read
from tests.chaos.system import At, Chaos
from tests.integration.processes import Process, assert_books_balance, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

STEPS, BATCH = 16, 8
TURNS = (
    f"training.steps={STEPS}",
    "buffer.lag=0",
    "checkpoints.every_steps=4",
)
MOMENTS = {
    "after the write and before the acknowledgement": ("learner.stored", 30),
    "after the acknowledgement": ("learner.answered", 150),
    "after the optimiser step and before the checkpoint": ("learner.step.done", 7),
    "in the middle of an optimiser step": ("learner.step.inside", 14),
    "during the checkpoint": ("learner.save.half", 2),
    "after the checkpoint": ("learner.save.done", 2),
    "during a weight push": ("learner.push.joined", 1),
    "after a weight push": ("learner.push.done", 9),
}


def bind() -> str:
    """An address that a resumed learner can have again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"endpoints.bind=tcp://127.0.0.1:{probe.getsockname()[1]}"


def losses(chaos: Chaos) -> list[tuple[int, float]]:
    lines = (chaos.run_folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def end(actors: list[Process]) -> None:
    """One that was still waiting to connect again, when the run was over, does not know it."""
    for actor in actors:
        if actor.popen.poll() is None:
            actor.signal(signal.SIGTERM)
        assert actor.wait(20) == 0, actor.output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Step and loss of a run that nothing happens to."""
    chaos = Chaos(tmp_path_factory.mktemp("undisturbed"))
    try:
        chaos.start_learner(*TURNS, bind())
        for name in ("one", "two"):
            chaos.start_toy(name, group_s=0.05)
        assert chaos.learner.wait(90) == 0, chaos.learner.output
        return losses(chaos)
    finally:
        chaos.close()


@pytest.mark.parametrize("moment", MOMENTS)
def test_guarantees_1_2_and_7_after_a_kill(
    chaos: Chaos,
    figures: Callable[..., None],
    undisturbed: list[tuple[int, float]],
    moment: str,
):
    chaos.start_learner(*TURNS, bind(), crash=At(*MOMENTS[moment], "kill"))
    actors = [chaos.start_toy(name, group_s=0.05) for name in ("one", "two")]
    killed_at = chaos.expect_crash(chaos.learner).at
    assert chaos.learner.wait() == -signal.SIGKILL

    chaos.resume_learner()
    assert chaos.learner.wait(90) == 0, chaos.learner.output
    end(actors)

    assert losses(chaos) == undisturbed
    counted = audit(chaos)
    first = of(read(chaos.record), "trained")
    back = min(e["at"] for e in first if e["at"] > killed_at) - killed_at
    figures(moment=moment, training_again_s=back, **counted)


def test_a_learner_that_is_killed_again_and_again(chaos: Chaos, figures: Callable[..., None]):
    """While nothing takes turns: every step comes out as it did before the kill, too."""
    chaos.start_learner(*TURNS[2:], "training.steps=60", bind())
    actors = [chaos.start_toy(name, group_s=0.1) for name in ("one", "two")]
    seen: dict[int, float] = {}
    back = []
    for target in (7, 18, 29):
        chaos.wait_for_step(target)
        # Whoever sees a version sees one that stays.
        at = chaos.strike(chaos.learner, signal.SIGKILL).at
        chaos.learner.wait()
        seen |= dict(losses(chaos))
        chaos.resume_learner()
        chaos.wait_for_step(target + 1)
        back.append(time.monotonic() - at)
    assert chaos.learner.wait(90) == 0, chaos.learner.output
    end(actors)
    final = losses(chaos)
    assert [step for step, _ in final] == list(range(1, 61))
    assert seen.items() <= dict(final).items()
    figures(kills=3, training_again_max_s=max(back), **audit(chaos))


def test_a_resumed_learner_that_is_killed_while_it_catches_up(
    chaos: Chaos, undisturbed: list[tuple[int, float]]
):
    chaos.start_learner(*TURNS, bind(), crash=At("learner.step.done", 7, "kill"))
    actors = [chaos.start_toy(name, group_s=0.05) for name in ("one", "two")]
    chaos.expect_crash(chaos.learner)
    chaos.learner.wait()
    # Steps 5, 6 and 7 are trained again: it dies after the second of them.
    again = chaos.entry(
        "again",
        *("learner", "--resume", str(chaos.run_folder)),
        crash=At("learner.step.done", 2, "kill"),
    )
    wait_for(lambda: again.popen.poll() is not None, "the second death")
    assert again.popen.returncode == -signal.SIGKILL, again.output
    chaos.resume_learner()
    assert chaos.learner.wait(90) == 0, chaos.learner.output
    end(actors)
    assert losses(chaos) == undisturbed
    audit(chaos)


def audit(chaos: Chaos) -> dict[str, Any]:
    """What all learners of the run did together."""
    events = read(chaos.record)
    journal = JournalReader.open(chaos.run_folder / "journal.sqlite")
    stored = set(journal.prompt_indices())
    journal.close()
    # A step that was taken again replaces the one before: only one of them is in the weights.
    steps = {e["version"]: e["prompt_indices"] for e in of(events, "trained", "trained_again")}
    trained = Counter(
        prompt_index for prompt_indices in steps.values() for prompt_index in prompt_indices
    )
    summary = chaos.summary
    assert_books_balance(summary)
    assert sorted(steps) == list(range(summary["steps"]))
    assert summary["books"]["groups"]["trained"] == trained.total()

    # 1. None is trained more than max_uses = 1 times.
    assert max(trained.values()) == 1
    # 2. What an actor was told is stored, is. A lease number may come again after a kill: it is
    # the last one before the acknowledgement that counts.
    prompt_indices: dict[int, int] = {}
    acknowledged = set()
    for event in events:
        if event["event"] == "leased" and event["purpose"] == "train":
            prompt_indices[event["lease"]] = event["prompt_index"]
        elif event["event"] == "acked" and event["verdict"] == "accepted":
            acknowledged.add(prompt_indices.get(event["lease"], -1))
    acknowledged.discard(-1)
    # What is trained, and covered by every checkpoint, is deleted from the journal.
    lost = acknowledged - stored - trained.keys()
    assert not lost
    # 7. The checkpoint of the last step is whole.
    checkpoint = newest(chaos.run_folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.version == summary["steps"]
    return {
        "groups_acknowledged": len(acknowledged),
        "groups_lost": len(lost),
        "groups_duplicated": sum(uses > 1 for uses in trained.values()),
        "groups_trained": trained.total(),
    }

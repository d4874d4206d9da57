"""A learner that is killed, and the run that goes on: guarantees 2, 3 and 7."""

import signal
from collections import Counter

import pytest

from learner.completions.files import read_completions
from learner.replay.journal_reader import JournalReader
from tests.integration.processes import (
    QUICK,
    RECIPE,
    System,
    assert_books_balance,
    children_of,
    free_port,
    is_alive,
    steps,
    versions_sampled_from,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAST = ("checkpoints.every_steps=4", "deadlines.actor_timeout_s=3", "weights.timeout_s=2")


def test_guarantee_2_and_7_a_killed_learner_goes_on_with_its_actors(system: System):
    bind = f"endpoints.bind=tcp://127.0.0.1:{free_port()}"
    system.start_learner("training.steps=40", *FAST, bind)
    actor = system.start_actor("actor")
    system.wait_for_step(11)
    system.learner.signal(signal.SIGKILL)
    system.learner.wait()
    with_journal = JournalReader.open(system.run_folder / "journal.sqlite")
    stored, batches = set(with_journal.prompt_indices()), with_journal.batches()
    with_journal.close()
    before = {line["step"]: line for line in steps(system)}

    system.resume_learner()
    assert f"from step {batches[-1].step // 4 * 4 - 4}" in system.learner.output or (
        f"from step {batches[-1].step // 4 * 4}" in system.learner.output
    )
    system.wait_for_step(40)
    assert system.learner.wait(40) == 0, system.learner.output
    assert actor.wait(20) == 0, actor.output
    assert "joined again" in actor.output

    after = {line["step"]: line for line in steps(system)}
    assert list(after) == [line["step"] for line in steps(system)] == list(range(1, 41))
    kept = Counter(row.step for row in read_completions(system.run_folder / "completions.parquet"))
    # A sample of every step, and all 8 groups of 4 rollouts of the last one.
    assert kept == dict.fromkeys(range(1, 40), 8) | {40: 8 * 4}
    for step, line in before.items():
        # The same groups, in the same order, by the same arithmetic.
        assert line["loss"] == after[step]["loss"]
        assert line["rewards"] == after[step]["rewards"]
    summary = system.summary
    assert summary["completed"]
    assert summary["steps"] == 40
    assert [(e["due"], e["sets"]["heldout"]["prompts"]) for e in summary["evaluations"]] == [
        (0, 8),
        (40, 8),
    ]
    assert summary["weights"]["digest_mismatches"] == 0
    assert_books_balance(summary)
    assert summary["books"]["groups"]["trained"] == 40 * 8
    assert len(stored) <= summary["books"]["groups"]["accepted"]


def test_a_resumed_learner_pushes_the_versions_that_it_would_have_pushed(system: System):
    bind = f"endpoints.bind=tcp://127.0.0.1:{free_port()}"
    rare = ("weights.push_every=3", "training.max_staleness=4")
    system.start_learner("training.steps=31", *FAST, bind, *rare)
    actor = system.start_actor("actor")
    system.wait_for_step(8)
    system.learner.signal(signal.SIGKILL)
    system.learner.wait()
    journal = JournalReader.open(system.run_folder / "journal.sqlite")
    reached = journal.batches()[-1].step
    journal.close()
    before = {line["step"]: line["loss"] for line in steps(system)}

    system.resume_learner()
    assert system.learner.wait(60) == 0, system.learner.output
    assert actor.wait(20) == 0, actor.output
    after = {line["step"]: line["loss"] for line in steps(system)}
    assert list(after) == list(range(1, 32))
    assert before.items() <= after.items()
    summary = system.summary
    assert_books_balance(summary)
    assert summary["staleness"]["largest"] <= 4
    assert summary["weights"]["digest_mismatches"] == 0
    assert summary["evaluations"][-1]["version"] == 31
    assert summary["evaluations"][-1]["sets"]["heldout"]["prompts"] == 8
    # Of 3, 6, ... 30 those above where it went on, and 31.
    assert summary["weights"]["pushes"] == 10 - reached // 3 + 1
    # Actors have what the resume reached, too, until the next one comes.
    assert versions_sampled_from(system.run_folder) <= {reached, *range(0, 31, 3)}


def test_a_run_that_was_stopped_goes_on_under_the_launcher(system: System):
    run = system.gdpo("run", "run", str(RECIPE), *QUICK, "training.steps=400", *FAST)
    system.wait_until_it_listens(run)
    system.wait_for_step(6)
    run.signal(signal.SIGINT)
    assert run.wait(30) == 130, run.output
    stopped_at = system.summary["steps"]

    again = system.gdpo(
        "again", "run", "--resume", str(system.run_folder), f"training.steps={stopped_at + 5}"
    )
    wait_for(lambda: len(children_of(again.pid)) == 3, "its processes")
    children = children_of(again.pid)
    assert again.wait(80) == 0, again.output
    assert not any(map(is_alive, children))
    assert [line["step"] for line in steps(system)] == list(range(1, stopped_at + 6))
    assert_books_balance(system.summary)
    assert [e["due"] for e in system.summary["evaluations"]] == [0, stopped_at + 5]


def test_without_a_journal_a_run_goes_on_from_its_checkpoint(system: System):
    bind = f"endpoints.bind=tcp://127.0.0.1:{free_port()}"
    system.start_learner("training.steps=20", *FAST, bind, "buffer.durability=memory")
    actor = system.start_actor("actor")
    system.wait_for_step(10)
    system.learner.signal(signal.SIGKILL)
    system.learner.wait()
    assert not (system.run_folder / "journal.sqlite").exists()
    system.resume_learner()
    assert "from step 8" in system.learner.output or "from step 4" in system.learner.output
    assert system.learner.wait(60) == 0, system.learner.output
    assert actor.wait(20) == 0, actor.output
    assert [line["step"] for line in steps(system)] == list(range(1, 21))
    assert_books_balance(system.summary)


def test_what_a_run_cannot_be_resumed_with_is_one_clear_line(system: System):
    system.start_learner("training.steps=40", *FAST)
    folder = str(system.run_folder)
    for arguments, expected in (
        ((folder,), "another learner works in"),
        ((folder, "seed=5"), "seed cannot change when a run is resumed"),
        ((folder, "sampling.max_tokens=16"), "sampling cannot change"),
        ((str(system.folder),), "is no folder of a run that can be resumed"),
    ):
        command = system.gdpo("again", "learner", "--resume", *arguments)
        assert command.wait(30) == 2, command.output
        assert expected in command.output
        assert "Traceback" not in command.output
    both = system.gdpo("both", "learner", str(RECIPE), "--resume", folder)
    assert both.wait(30) == 2
    assert "leave" in both.output
    neither = system.gdpo("neither", "run")
    assert neither.wait(30) == 2
    assert "give a CONFIG file, or --resume FOLDER" in neither.output

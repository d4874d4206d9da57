"""When evaluations begin and end, with a real coordinator and one actor."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from learner.run.evaluations import Evaluations
from learner.run.parts import Parts
from learner.run.progress import Progress
from learner.run_folder import RunFolder
from protocol.messages import Lease
from tests.unit.factories import Cluster, make_config, make_snapshot


class Run:
    """The parts of a run that evaluations need; ``every`` is `eval.every_steps`."""

    def __init__(self, folder: Path, every: int) -> None:
        config = make_config(
            data={"heldout": "h"},
            eval={"every_steps": every, "prompts": 2, "num_rollouts": 2},
            training={"steps": 10, "max_staleness": 9},
        )
        self.cluster = Cluster(config)
        self.cluster.join("a", capacity=30)
        self.progress = Progress()
        self.folder = RunFolder(folder)
        parts = SimpleNamespace(
            config=config,
            coordinator=self.cluster.coordinator,
            folder=self.folder,
            heartbeat=SimpleNamespace(beat=self.answer),
            heldout=[[{"prompt": f"p{i}"} for i in range(3)]],
            progress=self.progress,
            trainer=SimpleNamespace(version=0),
        )
        self.trainer = parts.trainer
        self.evaluations = Evaluations(cast(Parts, parts))

    def answer(self) -> None:
        """The actor finishes all that it holds of evaluations."""
        for lease in self.cluster.heard("a", Lease):
            if lease.purpose == "eval":
                message = self.cluster.group_message(lease.lease, version=self.version)
                self.cluster.say("a", *message)

    @property
    def version(self) -> int:
        """What the actor has."""
        [actor] = self.cluster.coordinator.actors()
        return actor.version

    def step(self, version: int) -> None:
        """A step after which the actor, if it follows, has the new version."""
        self.trainer.version = self.cluster.version = version
        self.cluster.snapshots.publish(make_snapshot(version))
        self.cluster.coordinator.advance(version)
        if not self.cluster.coordinator.actors()[0].evaluates:
            self.cluster.weights_ready("a", version)
        self.evaluations.step_done(version)

    @property
    def done(self) -> list[tuple[int, int]]:
        """(due, version) of the evaluations that are done."""
        done = [(e.due, e.version) for e in self.progress.evaluations]
        assert self.folder.read_evaluations() == self.progress.evaluations
        return done


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.run.evaluations.STOP_CHECK_S", 0.001)


def test_before_and_after_are_waited_for_and_only_what_is_due_is_between(tmp_path):
    run = Run(tmp_path, every=4)
    run.evaluations.before()
    assert run.done == [(0, 0)]
    run.cluster.open_training()
    for version in range(1, 11):
        run.step(version)
        run.answer()
        run.evaluations.look()
    assert run.done == [(0, 0), (4, 4), (8, 8)]
    run.evaluations.after()
    assert run.done == [(0, 0), (4, 4), (8, 8), (10, 10)]


def test_without_every_steps_only_the_first_and_the_last_policy_are_evaluated(tmp_path):
    run = Run(tmp_path, every=0)
    run.evaluations.before()
    run.cluster.open_training()
    for version in range(1, 11):
        run.step(version)
    run.evaluations.after()
    assert run.done == [(0, 0), (10, 10)]


def test_one_that_is_due_during_another_begins_after_it_and_one_too_many_is_named(tmp_path, caplog):
    run = Run(tmp_path, every=2)
    run.evaluations.before()
    run.cluster.open_training()
    with caplog.at_level(logging.WARNING):
        for version in range(1, 7):
            run.step(version)
    # That of step 2 is not done yet; step 4 waited for it, until step 6 took its place.
    assert run.done == [(0, 0)]
    assert "no evaluation of step 4: evaluations take longer than eval.every_steps = 2" in (
        caplog.text
    )
    run.answer()
    run.evaluations.look()
    assert run.done == [(0, 0), (2, 2)]
    run.cluster.weights_ready("a", 6)
    run.answer()
    run.evaluations.look()
    assert run.done == [(0, 0), (2, 2), (6, 6)]


def test_a_resumed_run_begins_what_was_due_and_makes_nothing_twice(tmp_path):
    first = Run(tmp_path, every=4)
    first.evaluations.before()
    again = Run(tmp_path, every=4)
    again.progress.evaluations = again.folder.read_evaluations()
    again.evaluations.before()
    assert again.done == [(0, 0)]
    again.step(6)
    again.cluster.open_training()
    again.evaluations.resume()
    again.answer()
    again.evaluations.look()
    assert again.done == [(0, 0), (4, 6)]
    again.evaluations.resume()
    again.evaluations.look()
    assert again.progress.evaluating is None


def test_a_stop_ends_the_wait_without_a_result(tmp_path, monkeypatch):
    run = Run(tmp_path, every=0)
    beats: list[Any] = []

    def stop_soon() -> None:
        beats.append(run.progress.evaluating)
        if len(beats) == 3:
            run.progress.stop("SIGTERM")

    monkeypatch.setattr(run.evaluations._parts.heartbeat, "beat", stop_soon)
    run.evaluations.before()
    assert len(beats) == 3
    assert run.done == []
    run.evaluations.after()
    assert run.done == []

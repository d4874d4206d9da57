"""A learner on several ranks, started by torchrun, and what becomes of it when one is lost."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.integration.processes import (
    QUICK,
    RECIPE,
    Process,
    System,
    assert_books_balance,
    children_of,
    free_port,
    is_alive,
    steps,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TORCHRUN = "torch.distributed.run"
FAST = (
    "checkpoints.every_steps=4",
    "deadlines.actor_timeout_s=3",
    "deadlines.ranks_timeout_s=6",
    "weights.timeout_s=2",
    # The number of steps changes at a resume: the learning rate must not follow it.
    "optimizer.lr_schedule=constant",
)


def start_ranks(system: System, name: str, number: int, *arguments: str) -> Process:
    (system.run_folder / "endpoints.json").unlink(missing_ok=True)
    torchrun = ("--standalone", "--nproc-per-node", str(number), "-m", "learner")
    process = system.gdpo(name, *torchrun, *arguments, module=TORCHRUN)
    system.wait_until_it_listens(process)
    return process


def start_fatal_ranks(system: System, point: str, deed: str, *overrides: str) -> Process:
    """Two ranks, of which the second one does ``deed`` to itself at the fatal moment."""
    torchrun = ("--standalone", "--nproc-per-node", "2", "-m", "tests.chaos.rank")
    fatal = ("--at", point, "--do", deed, "--mark", str(system.folder / "mark"), "--")
    process = system.gdpo(
        "two", *torchrun, *fatal, str(RECIPE), *QUICK, *FAST, *overrides, module=TORCHRUN
    )
    system.wait_until_it_listens(process)
    return process


def pid_of_rank(torchrun: Process, rank: int) -> int:
    for pid in children_of(torchrun.pid):
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError(torchrun.output)


def losses(system: System) -> dict[int, float]:
    if not (system.run_folder / "metrics.jsonl").exists():
        return {}
    return {line["step"]: line["loss"] for line in steps(system)}


def test_a_run_goes_on_from_two_ranks_to_one_and_back(system: System):
    bind = f"endpoints.bind=tcp://127.0.0.1:{free_port()}"
    ranks = start_ranks(system, "two", 2, str(RECIPE), *QUICK, *FAST, bind, "training.steps=400")
    actor = system.start_actor("actor")
    system.wait_for_step(6)
    lost = pid_of_rank(ranks, 1)
    os.kill(lost, signal.SIGKILL)
    assert ranks.wait(60) != 0
    named = re.search(r"rank 1 of the learner \(process (\d+) on .*\) has died", ranks.output)
    assert named, ranks.output
    assert int(named[1]) == lost
    assert "rank 1 of the learner" in system.summary["ended_because"]
    before = losses(system)

    system.resume_learner("training.steps=400")
    system.wait_for_step(max(before) + 2)
    again = losses(system)
    for step, loss in before.items():
        # The same groups in the same order; sums in another order.
        assert again[step] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert not system.summary_after_stop()["completed"]
    reached = max(losses(system))

    ranks = start_ranks(
        system, "again", 2, "--resume", str(system.run_folder), f"training.steps={reached + 3}"
    )
    assert ranks.wait(120) == 0, ranks.output
    assert actor.wait(20) == 0, actor.output
    assert list(losses(system)) == list(range(1, reached + 4))
    summary = system.summary
    assert summary["completed"]
    assert summary["weights"]["digest_mismatches"] == 0
    assert_books_balance(summary)


def test_a_rank_that_hangs_ends_the_learner_within_its_deadline(system: System):
    ranks = start_ranks(system, "two", 2, str(RECIPE), *QUICK, *FAST, "training.steps=400")
    system.start_actor("actor")
    system.wait_for_step(2)
    stopped, leader = pid_of_rank(ranks, 1), pid_of_rank(ranks, 0)
    os.kill(stopped, signal.SIGSTOP)
    wait_for(lambda: not is_alive(leader), "the end of rank 0", 40)
    assert re.search(
        rf"error: rank 1 of the learner \(process {stopped} on .*\) does not answer", ranks.output
    ), ranks.output
    assert "rank 1 of the learner" in system.summary["ended_because"]
    # torchrun gives the one that is stopped 30 s.
    os.kill(stopped, signal.SIGKILL)
    assert ranks.wait(60) != 0


@pytest.mark.parametrize(
    ("point", "deed"),
    [
        ("rank.waits:4", "kill"),
        ("rank.forward:40", "kill"),
        ("rank.forward:40", "hang"),
        ("rank.reduced:4", "kill"),
        ("rank.gather:40", "kill"),
        ("rank.gather:40", "stop"),
        ("rank.checkpoint:2", "kill"),
    ],
)
def test_whatever_a_rank_was_doing_the_run_goes_on(system: System, point: str, deed: str):
    bind = f"endpoints.bind=tcp://127.0.0.1:{free_port()}"
    ranks = start_fatal_ranks(system, point, deed, bind, "training.steps=400")
    leader = pid_of_rank(ranks, 0)
    actor = system.start_actor("actor")
    wait_for((system.folder / "mark").exists, point)
    mark = json.loads((system.folder / "mark").read_text())
    wait_for(lambda: not is_alive(leader), "the end of rank 0", 40)
    cause = system.summary["ended_because"]
    assert f"rank 1 of the learner (process {mark['pid']} on" in cause
    if deed == "hang":
        assert "hangs in learner.packing.forward:" in cause
    if is_alive(mark["pid"]):
        os.kill(mark["pid"], signal.SIGKILL)
    assert ranks.wait(60) != 0
    before = losses(system)

    reached = max(before, default=0)
    again = start_ranks(
        system, "again", 2, "--resume", str(system.run_folder), f"training.steps={reached + 4}"
    )
    assert again.wait(120) == 0, again.output
    assert actor.wait(20) == 0, actor.output
    after = losses(system)
    assert list(after) == list(range(1, reached + 5))
    # The same number of ranks: bit for bit.
    assert before.items() <= after.items()
    assert_books_balance(system.summary)


def test_two_machines_train_together(system: System):
    """As two torchruns, which meet over a port of the first one."""
    rendezvous = f"127.0.0.1:{free_port()}"
    torchrun = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    command = (*torchrun, "--rdzv-endpoint", rendezvous, "--local-addr", "127.0.0.1")
    overrides = (str(RECIPE), *QUICK, *FAST, "training.steps=3")
    machines = [
        system.gdpo(name, *command, "-m", "learner", *overrides, module=TORCHRUN)
        for name in ("first", "second")
    ]
    path = system.run_folder / "endpoints.json"
    wait_for(path.exists, "the learner")
    system.wait_until_it_listens(machines[0])
    actor = system.start_actor("actor")
    for machine in machines:
        assert machine.wait(120) == 0, machine.output
    assert actor.wait(20) == 0, actor.output
    assert system.summary["completed"]
    assert len(list((system.folder / "runs").iterdir())) == 1


def test_torchrun_that_is_told_to_end_ends_the_run_in_order(system: System):
    ranks = start_ranks(system, "two", 2, str(RECIPE), *QUICK, *FAST, "training.steps=400")
    actor = system.start_actor("actor")
    system.wait_for_step(2)
    ranks.signal(signal.SIGTERM)
    assert ranks.wait(40) != 0  # As a process that was told to end.
    assert actor.wait(20) == 0, actor.output
    summary = system.summary
    assert summary["ended_because"] == "SIGTERM"
    assert summary["checkpoint"].endswith(f"step-{summary['steps']:08}/model")
    assert_books_balance(summary)

"""`gdpo compare` with real runs: it finishes, and goes on where it was stopped."""

import json
import signal

import pytest

from tests.integration.processes import QUICK, RECIPE, System, wait_for

pytestmark = pytest.mark.timeout(120)

GRID = ("compare", str(RECIPE), "--estimators", "gdpo,grpo", "--seeds", "1", "--out", "grid")


def test_a_comparison_goes_on_where_it_was_stopped(system: System):
    out = system.folder / "grid"
    arguments = (*GRID, "--jobs", "1", *QUICK, "learner.steps=4")
    first = system.gdpo("first", *arguments)
    wait_for(lambda: (out / "gdpo-decoupled_ppo-0" / "summary.json").exists(), "a run", 60)
    wait_for(lambda: (out / "grpo-decoupled_ppo-0.log").exists(), "the next run", 30)
    first.signal(signal.SIGINT)
    assert first.wait(40) == 130, first.output
    assert "the same command goes on" in first.output
    done_at = (out / "gdpo-decoupled_ppo-0" / "summary.json").stat().st_mtime

    second = system.gdpo("second", *arguments)
    assert second.wait(60) == 0, second.output
    assert (out / "gdpo-decoupled_ppo-0" / "summary.json").stat().st_mtime == done_at
    result = json.loads((out / "compare.json").read_text())
    assert result["labels"].keys() == {"gdpo", "grpo"}
    assert len(result["labels"]["grpo"]["0"]["curves"]["format"]) == 4
    assert (out / "compare.png").exists()

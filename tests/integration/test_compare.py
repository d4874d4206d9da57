"""`gdpo compare` with real runs: it finishes, and goes on where it was stopped."""

import json
import signal

import pytest

from tests.integration.processes import QUICK, RECIPE, System, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

GRID = ("compare", str(RECIPE), "--estimators", "gdpo,grpo", "--seeds", "1", "--out", "grid")


def test_a_comparison_goes_on_where_it_was_stopped(system: System):
    out = system.folder / "grid"
    arguments = (*GRID, "--jobs", "1", *QUICK, "training.steps=4")
    first = system.gdpo("first", *arguments)
    wait_for(lambda: (out / "gdpo-icepop-0" / "summary.json").exists(), "a run", 60)
    wait_for(lambda: (out / "grpo-icepop-0.log").exists(), "the next run", 30)
    first.signal(signal.SIGINT)
    assert first.wait(40) == 130, first.output
    assert "the same command goes on" in first.output
    done_at = (out / "gdpo-icepop-0" / "summary.json").stat().st_mtime

    second = system.gdpo("second", *arguments)
    assert second.wait(60) == 0, second.output
    assert (out / "gdpo-icepop-0" / "summary.json").stat().st_mtime == done_at
    result = json.loads((out / "compare.json").read_text())
    assert [run["estimator"] for run in result["runs"]] == ["gdpo", "grpo"]
    assert len(result["runs"][1]["curves"]["format"]) == 4
    assert (out / "compare.png").exists()

    # What took long is not thrown away for another recipe.
    other = system.gdpo("other", *arguments, "optimizer.lr=1e-5")
    assert other.wait(30) == 2
    assert "holds a complete run of another configuration" in other.output
    assert json.loads((out / "compare.json").read_text()) == result


def test_a_lag_is_kept_by_every_batch(system: System):
    arguments = (*GRID[:2], "--estimators", "gdpo", "--lags", "2", "--seeds", "1", "--out", "lags")
    sweep = system.gdpo("sweep", *arguments, *QUICK, "training.steps=5")
    assert sweep.wait(60) == 0, sweep.output
    run = system.folder / "lags" / "gdpo-icepop-lag2-0"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The first three batches are all sampled from version 0.
    assert [line["staleness_max"] for line in lines] == [0, 1, 2, 2, 2]
    assert [line["staleness_mean"] for line in lines] == [0, 1, 2, 2, 2]
    books = json.loads((run / "summary.json").read_text())["books"]
    assert books["groups"]["accepted"] == books["groups"]["trained"] > 0

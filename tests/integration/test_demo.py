"""The demo that the README promises, at full size."""

import pytest

from tests.integration.processes import RECIPE, System, assert_books_balance


@pytest.mark.demo
@pytest.mark.timeout(360)
def test_the_demo_learns_the_format_and_gains_correctness(system: System):
    run = system.gdpo("run", "run", str(RECIPE))
    assert run.wait(300) == 0, run.output
    print(run.output)
    summary = system.summary
    before, after = (e["sets"]["heldout"]["means"] for e in summary["evaluations"])
    assert before["format"] < 0.10
    assert after["format"] > 0.90
    assert after["correctness"] >= before["correctness"] + 0.5
    assert summary["lag0_logprob_difference"] < 1e-4
    assert summary["staleness"]["largest"] <= summary["staleness"]["limit"]
    assert_books_balance(summary)

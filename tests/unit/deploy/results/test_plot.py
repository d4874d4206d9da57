"""The curves of a run, with what its evaluations found."""

from typing import Any

from matplotlib import pyplot

from deploy.results.plot import plot_run
from learner.run_folder import RunFolder
from tests.unit.record_examples import HELDOUT, make_evaluation, make_step


def drawn(folder: RunFolder, monkeypatch) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points of every line by its label and by the name of its axis."""
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    assert plot_run(folder).stat().st_size > 10_000
    [figure] = figures
    return {
        axis.get_ylabel(): {
            line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            for line in axis.lines
        }
        for axis in figure.axes
    }


def test_evaluations_are_drawn_at_their_version_beside_the_training_reward(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.append_step(make_step(step, rewards={"a": 0.5 * step, "b": 0.25}))
    for version, mean in ((0, 0.125), (2, 0.75)):
        sets = {"heldout": HELDOUT | {"means": {"a": mean, "b": None}, "pass_at": {"4": mean}}}
        folder.append_evaluation(make_evaluation(due=version, version=version, sets=sets))
    folder.close()
    axes = drawn(folder, monkeypatch)
    assert axes["a"] == {"training": [(1, 0.5), (2, 1.0)], "heldout": [(0, 0.125), (2, 0.75)]}
    assert axes["b"] == {"training": [(1, 0.25), (2, 0.25)]}
    assert axes["pass@k"] == {"heldout pass@4": [(0, 0.125), (2, 0.75)]}


def test_without_evaluations_there_is_no_place_for_them(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.append_step(make_step(1, rewards={"a": 0.5}))
    folder.close()
    axes = drawn(folder, monkeypatch)
    assert axes["a"] == {"training": [(1, 0.5)]}
    assert "pass@k" not in axes

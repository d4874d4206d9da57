"""Comparisons: the grid, the statistics over seeds by hand, and what is drawn from the JSON."""

import json
import math

import pytest

from deploy.cli import main
from deploy.compare import Cell, Comparison, parse_names
from deploy.compare_report import (
    WINDOW,
    collect,
    levels,
    plot_comparison,
    print_comparison,
    statistics,
    steps_to,
)
from protocol.errors import ConfigError


def make_run(curve: list[float], after: float | None = None) -> dict:
    return {
        "before": {"format": 0.0},
        "after": None if after is None else {"format": after},
        "curves": {"format": curve},
        "ess": [1.0] * len(curve),
    }


def rising(start: int, steps: int = 40) -> list[float]:
    """0 until step ``start``, 1 from then on."""
    return [0.0] * (start - 1) + [1.0] * (steps - start + 1)


def make_comparison(recipe, tmp_path, **changes) -> Comparison:
    values = {
        "config": recipe,
        "overrides": ("learner.steps=3",),
        "estimators": ("gdpo", "grpo"),
        "corrections": ("ppo",),
        "num_seeds": 2,
        "out": tmp_path,
        "jobs": 2,
    }
    return Comparison(**(values | changes))


def test_the_grid_goes_seed_by_seed(recipe, tmp_path):
    cells = make_comparison(recipe, tmp_path).cells
    assert [cell.name for cell in cells] == ["gdpo-ppo-0", "grpo-ppo-0", "gdpo-ppo-1", "grpo-ppo-1"]


def test_a_cell_is_the_recipe_with_its_estimator_correction_and_seed(recipe, tmp_path):
    comparison = make_comparison(recipe, tmp_path)
    config = comparison.resolved(Cell("grpo_no_std", "ppo", 3))
    assert (config.algorithm.estimator, config.algorithm.correction) == ("grpo_no_std", "ppo")
    assert (config.seed, config.learner.steps, config.launch.actors) == (3, 3, 1)
    assert config.runs_folder == str(tmp_path)


def test_a_label_names_only_what_differs(recipe, tmp_path):
    cell = Cell("gdpo", "ppo", 0)
    assert make_comparison(recipe, tmp_path).label(cell) == "gdpo"
    both = make_comparison(recipe, tmp_path, corrections=("ppo", "none"))
    assert both.label(cell) == "gdpo ppo"
    assert (
        make_comparison(recipe, tmp_path, estimators=("gdpo",), corrections=("ppo", "none")).label(
            cell
        )
        == "ppo"
    )


def test_unknown_and_repeated_names():
    assert parse_names("gdpo, grpo,gdpo", ("gdpo", "grpo"), "estimator") == ("gdpo", "grpo")
    with pytest.raises(ConfigError, match="unknown estimator 'gpdo'; the known ones are gdpo"):
        parse_names("gpdo", ("gdpo",), "estimator")


def test_a_level_is_reached_by_the_mean_over_a_window():
    # Nine of the ten last steps are 1 for the first time at step 13 + 9 - 1.
    assert steps_to(rising(13), 0.9) == 21
    assert steps_to([0.0] * 40, 0.9) is None
    assert steps_to([1.0] * 40, 0.9) == WINDOW
    assert steps_to([1.0] * 3, 0.9) == 3


def test_statistics_over_seeds():
    seeds = {
        "0": make_run(rising(11), after=0.8),
        "1": make_run(rising(21), after=1.0),
        "2": make_run([0.0] * 40, after=0.0),
    }
    row = statistics(seeds, "format", 0.9)
    assert row["final"] == pytest.approx(0.6)  # 1.8 / 3
    # t(0.975, 2) = 4.30265; the sample std of (.8, 1, 0) is sqrt((.04 + .16 + .36) / 2).
    assert row["half_width"] == pytest.approx(4.30265 * math.sqrt(0.28) / math.sqrt(3), rel=1e-4)
    assert row["area"] == pytest.approx((30 + 20 + 0) / 40 / 3)
    # Reached at 19, at 29 and never: the median is 29.
    assert row["steps"] == 29
    assert row["converged"] == pytest.approx(2 / 3)


def test_a_setting_whose_median_seed_never_gets_there_has_no_number_of_steps():
    row = statistics({"0": make_run([0.0] * 20), "1": make_run(rising(2, 20))}, "format", 0.9)
    assert row["steps"] is None
    assert row["converged"] == 0.5
    assert row["final"] is None


def test_the_level_is_a_share_of_the_whole_range():
    result = {"labels": {"a": {"0": make_run([0.2] * 20)}, "b": {"0": make_run([0.7] * 20)}}}
    # .2 + .9 * (.7 - .2)
    assert levels(result)["format"] == pytest.approx(0.65)


def test_what_runs_left_becomes_json_table_and_plot(tmp_path, capsys):
    for seed, start in enumerate((5, 15)):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        lines = [{"rewards": {"format": value}, "ess": 0.5} for value in rising(start)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        rewards = {"before": None, "after": {"means": {"format": 0.25 + 0.5 * seed}}}
        (folder / "summary.json").write_text(json.dumps({"rewards": rewards}))
    result = collect([("gdpo", seed, tmp_path / f"run{seed}") for seed in range(2)])
    (tmp_path / "compare.json").write_text(json.dumps(result))
    print_comparison(result)
    assert "0.500 ±" in capsys.readouterr().out
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "compare.png").stat().st_size > 5_000


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        plot_comparison(tmp_path)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        plot_comparison(tmp_path)

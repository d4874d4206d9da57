"""Comparisons: the grid, the statistics over seeds by hand, and what is drawn from the JSON."""

import json
import math
from typing import Any

import pytest

from deploy.cli import main
from deploy.results.compare import Cell, Comparison, parse_names
from deploy.results.compare_plot import plot_comparison
from deploy.results.compare_report import (
    WINDOW,
    area,
    by_setting,
    collect,
    converged,
    half_width,
    lags,
    levels,
    mean_ess,
    median_steps,
    print_comparison,
    steps_to,
)
from learner.run_folder import RunFolder
from protocol.errors import ConfigError
from tests.unit.record_examples import HELDOUT, make_evaluation, make_step, make_summary


def make_run(
    curve: list[float],
    after: float | None = None,
    *,
    estimator: str = "gdpo",
    correction: str = "ppo",
    lag: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    return {
        "estimator": estimator,
        "correction": correction,
        "lag": lag,
        "seed": seed,
        "before": {"format": 0.0},
        "after": {} if after is None else {"format": after},
        "curves": {"format": curve},
        "ess": [1.0] * len(curve),
    }


def rising(start: int, steps: int = 40) -> list[float]:
    """0 until step ``start``, 1 from then on."""
    return [0.0] * (start - 1) + [1.0] * (steps - start + 1)


def make_comparison(recipe, tmp_path, **changes) -> Comparison:
    values = {
        "config": recipe,
        "overrides": ("training.steps=3",),
        "estimators": ("gdpo", "grpo"),
        "corrections": ("ppo",),
        "lags": (None,),
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
    config = comparison.resolved(Cell("grpo_no_std", "ppo", None, 3))
    assert (config.algorithm.estimator, config.algorithm.correction) == ("grpo_no_std", "ppo")
    assert (config.seed, config.training.steps, config.launch.actors) == (3, 3, 1)
    assert config.runs_folder == str(tmp_path)


def test_a_lag_is_part_of_the_cell(recipe, tmp_path):
    comparison = make_comparison(recipe, tmp_path, estimators=("gdpo",), num_seeds=1, lags=(0, 8))
    assert [cell.name for cell in comparison.cells] == ["gdpo-ppo-lag0-0", "gdpo-ppo-lag8-0"]
    config = comparison.resolved(comparison.cells[1])
    assert (config.buffer.lag, config.training.max_staleness) == (8, 8)
    assert (
        make_comparison(recipe, tmp_path).resolved(Cell("gdpo", "ppo", None, 0)).buffer.lag is None
    )


def test_a_setting_is_named_by_what_differs():
    def names(*settings: tuple[str, str]) -> list[str]:
        runs = [make_run([0.0], estimator=e, correction=c) for e, c in settings]
        return list(by_setting({"runs": runs}))

    assert names(("gdpo", "ppo"), ("grpo", "ppo")) == ["gdpo", "grpo"]
    assert names(("gdpo", "ppo"), ("gdpo", "none")) == ["ppo", "none"]
    assert names(("gdpo", "ppo"), ("grpo", "none")) == ["gdpo ppo", "grpo none"]
    assert names(("gdpo", "ppo")) == ["gdpo"]


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
    runs = [make_run(rising(11)), make_run(rising(21)), make_run([0.0] * 40)]
    assert area(runs, "format") == pytest.approx((30 + 20 + 0) / 40 / 3)
    # Reached at 19, at 29 and never: the median is 29.
    assert median_steps(runs, "format", 0.9) == 29
    assert converged(runs, "format", 0.9) == pytest.approx(2 / 3)
    assert mean_ess(runs) == 1.0


def test_the_ess_of_a_lag_leaves_out_the_steps_before_it_is_complete():
    run = make_run([0.0] * 4, lag=3) | {"ess": [1.0, 0.9, 0.8, 0.4]}
    assert mean_ess([run]) == 0.4


def test_the_confidence_interval_of_a_mean():
    # t(0.975, 2) = 4.30265; the sample std of (.8, 1, 0) is sqrt((.04 + .16 + .36) / 2).
    assert half_width([0.8, 1.0, 0.0]) == pytest.approx(
        4.30265 * math.sqrt(0.28) / math.sqrt(3), rel=1e-4
    )
    assert half_width([0.8]) is None


def test_a_setting_whose_median_seed_never_gets_there_has_no_number_of_steps():
    runs = [make_run([0.0] * 20), make_run(rising(2, 20))]
    assert median_steps(runs, "format", 0.9) is None
    assert converged(runs, "format", 0.9) == 0.5


def test_the_level_is_a_share_of_the_whole_range():
    result = {"runs": [make_run([0.2] * 20), make_run([0.7] * 20)]}
    # .2 + .9 * (.7 - .2)
    assert levels(result)["format"] == pytest.approx(0.65)


def test_a_reward_that_applied_to_nothing_in_a_batch_leaves_the_other_batches():
    run = make_run([math.nan] * 15 + [0.5] * 15)
    assert area([run], "format") == 0.5
    assert levels({"runs": [run]})["format"] == 0.5
    # The first window of ten that holds anything ends at step 16.
    assert steps_to(run["curves"]["format"], 0.5) == 16


def write_run(folder: RunFolder, curve: list[float], after: float) -> None:
    folder.path.mkdir()
    for step, value in enumerate(curve, start=1):
        folder.append_step(make_step(step, rewards={"format": value}, ess=0.5))
    found = HELDOUT | {"means": {"format": after}, "pass_at": {}}
    evaluation = make_evaluation(due=len(curve), version=len(curve), sets={"heldout": found})
    folder.write_summary(make_summary(steps=len(curve), evaluations=[evaluation]))
    folder.close()


def collect_to_json(tmp_path, settings: list[dict[str, Any]]) -> dict[str, Any]:
    runs = []
    for index, setting in enumerate(settings):
        folder = RunFolder(tmp_path / f"run{index}")
        write_run(folder, rising(5 + 5 * index), after=0.25 + 0.5 * setting["seed"])
        runs.append((setting, folder))
    result = collect(runs)
    (tmp_path / "compare.json").write_text(json.dumps(result))
    return result


def test_what_runs_left_becomes_json_table_and_plot(tmp_path, capsys):
    setting = {"estimator": "gdpo", "correction": "ppo", "lag": None}
    result = collect_to_json(tmp_path, [setting | {"seed": seed} for seed in range(2)])
    print_comparison(result)
    assert "0.500 ±" in capsys.readouterr().out
    assert main(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "compare.png")]
    assert (tmp_path / "compare.png").stat().st_size > 5_000


def test_a_sweep_of_lags_has_a_column_for_each(tmp_path, capsys):
    settings = [
        {"estimator": "gdpo", "correction": correction, "lag": lag, "seed": 0}
        for correction in ("ppo", "none")
        for lag in (0, 8)
    ]
    result = collect_to_json(tmp_path, settings[:1] + settings[2:] + settings[1:2])
    assert lags(result) == [0, 8]
    print_comparison(result)
    printed = capsys.readouterr().out
    assert "lag 8" in printed
    # Run 0 is 1 from step 5 on, so nine of ten are at step 13; every further run is five later.
    assert [word for word in printed.split() if word in ("13", "18", "23", "28")] == [
        *("13", "28"),
        *("18", "23"),
    ]
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "compare-lags.png").stat().st_size > 5_000


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        plot_comparison(tmp_path)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        plot_comparison(tmp_path)
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no runs"):
        plot_comparison(tmp_path)
    (tmp_path / "compare.json").write_text('{"runs": [{}]}')
    with pytest.raises(ConfigError, match="a run lacks one of after, before"):
        plot_comparison(tmp_path)

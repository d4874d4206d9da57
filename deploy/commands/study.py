"""Commands that look at results: ``gdpo eval``, ``compare``, ``show``, ``journal``, ``plot``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from deploy import FAILURE
from deploy.commands.options import (
    add_allow_rewards,
    add_config,
    allowed_modules,
    load,
    numbers,
    positive,
)

if TYPE_CHECKING:
    from deploy.commands.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the commands of this module to the parser."""
    evaluate = commands.add_parser(
        "eval", help="score a model on held-out prompts, without a learner"
    )
    add_config(evaluate)
    evaluate.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="checkpoint or run folder (default: the config's)",
    )
    add_allow_rewards(evaluate)
    evaluate.set_defaults(command=_evaluate)

    _add_compare(commands)
    _add_show(commands)

    journal = commands.add_parser("journal", help="print what the journal of a run holds")
    journal.add_argument("run", type=Path, metavar="FOLDER", help="the run folder")
    journal.add_argument(
        "--replay",
        action="store_true",
        help="train on it again, without any actor, and compare the losses",
    )
    journal.set_defaults(command=_journal)

    plot = commands.add_parser("plot", help="draw the curves of a run or comparison again")
    plot.add_argument(
        "run", type=Path, metavar="FOLDER", help="the folder of the run or comparison"
    )
    plot.set_defaults(command=_plot)


def _add_compare(commands: "Commands") -> None:
    compare = commands.add_parser(
        "compare", help="train one recipe with several estimators and seeds"
    )
    add_config(compare)
    compare.add_argument(
        "--estimators",
        default="gdpo,grpo,grpo_no_std,grpo_batch_norm",
        metavar="NAME,NAME,...",
        help="default: %(default)s",
    )
    compare.add_argument(
        "--corrections", metavar="NAME,NAME,...", help="default: the configuration's"
    )
    compare.add_argument(
        "--lags",
        type=numbers,
        metavar="N,N,...",
        help="train each at these fixed stalenesses (they set training.max_staleness too)",
    )
    compare.add_argument(
        "--seeds", type=positive, default=5, metavar="N", help="how many (default: 5)"
    )
    compare.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/compare-CONFIG")
    compare.add_argument(
        "--jobs", type=positive, metavar="N", help="runs at once (default: one per core)"
    )
    add_allow_rewards(compare)
    compare.set_defaults(command=_compare)


def _add_show(commands: "Commands") -> None:
    show = commands.add_parser("show", help="read completions of a run, and what they scored")
    show.add_argument("run", type=Path, metavar="FOLDER", help="the run folder")
    order = show.add_mutually_exclusive_group()
    for name, first in (("best", "highest"), ("worst", "lowest")):
        order.add_argument(
            f"--{name}",
            dest="order",
            action="store_const",
            const=name,
            help=f"those first with the {first} advantage, or score by --reward; else the newest",
        )
    show.add_argument(
        "--reward", metavar="NAME", help="only those that this reward applies to, by its score"
    )
    show.add_argument("--step", type=positive, metavar="N", help="only those of this step")
    show.add_argument("--truncated", action="store_true", help="only those that were cut off")
    show.add_argument(
        "--count", type=positive, default=5, metavar="N", help="how many (default: 5)"
    )
    show.add_argument("--whole", action="store_true", help="long texts too, from end to end")
    show.add_argument("--json", action="store_true", help="print a JSON object a line")
    show.set_defaults(command=_show, order="newest")


def _evaluate(options: Any) -> int:
    config = load(options)
    from deploy.results.evaluate import evaluate

    return evaluate(config, options.model, allowed_modules(options))


def _compare(options: Any) -> int:
    config = load(options)
    from deploy.results.compare import Comparison, compare, parse_names
    from learner.config.algorithm import CorrectionName, EstimatorName

    corrections = options.corrections or config.algorithm.correction
    return compare(
        Comparison(
            config=Path(options.config),
            overrides=tuple(options.overrides),
            estimators=parse_names(options.estimators, get_args(EstimatorName), "estimator"),
            corrections=parse_names(corrections, get_args(CorrectionName), "correction"),
            lags=options.lags or (None,),
            num_seeds=options.seeds,
            out=options.out or Path(config.runs_folder) / f"compare-{Path(options.config).stem}",
            jobs=options.jobs or os.cpu_count() or 1,
            allowed_modules=tuple(options.allow_rewards),
        )
    )


def _show(options: Any) -> int:
    from deploy.results.show import Wish, show

    show(
        options.run,
        Wish(
            order=options.order,
            reward=options.reward,
            step=options.step,
            truncated=options.truncated,
            count=options.count,
        ),
        as_json=options.json,
        whole=options.whole,
    )
    return 0


def _journal(options: Any) -> int:
    from deploy.results.journal import print_journal, replay_journal

    if options.replay:
        return 0 if replay_journal(options.run) else FAILURE
    print_journal(options.run)
    return 0


def _plot(options: Any) -> int:
    if (options.run / "compare.json").exists():
        from deploy.results.compare_plot import plot_comparison

        print(*plot_comparison(options.run), sep="\n")
        return 0
    from deploy.results.plot import plot_run
    from learner.run_folder import RunFolder

    print(plot_run(RunFolder(options.run)))
    return 0

"""The `gdpo` command. Parsing imports nothing heavy: ``--help`` answers at once."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from deploy import FAILURE, INTERRUPTED, USER_ERROR
from protocol.errors import AsyncGdpoError, ConfigError, RewardError
from protocol.process import leave


def run() -> NoReturn:
    """The command as a process."""
    leave(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = _parse(arguments)
    command: Callable[[Any], int] = options.command
    try:
        return command(options)
    except (ConfigError, RewardError) as error:
        print(f"gdpo: error: {error}", file=sys.stderr)
        return USER_ERROR
    except AsyncGdpoError as error:
        print(f"gdpo: error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough; Python would still try to flush it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may also stand behind options, where argparse does not look for them."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "overrides") or any(word.startswith("-") for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.overrides += rest
    return options


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes longer than all of the parsing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"async-gdpo {version('async-gdpo')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gdpo", description="Asynchronous multi-reward reinforcement learning with GDPO."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print it and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _with_config(
        commands.add_parser("run", help="train on this machine: a learner and its actors"),
    )
    _add_resume(run)
    run.set_defaults(command=_run)

    learner = _with_config(
        commands.add_parser("learner", help="start a learner; actors join it from anywhere")
    )
    learner.add_argument("--run-folder", type=Path, help=argparse.SUPPRESS)
    _add_resume(learner)
    _add_child_options(learner)
    learner.set_defaults(command=_learner)

    actor = commands.add_parser("actor", help="join a running learner with one more actor")
    actor.add_argument("--learner", required=True, metavar="tcp://HOST:PORT")
    actor.add_argument("--metrics-port", type=int, default=0, help="0 (default): any free port")
    actor.add_argument("--metrics-host", default="127.0.0.1")
    actor.add_argument("--key", type=Path, metavar="FILE", help="this actor's .key_secret file")
    actor.add_argument("--learner-key", type=Path, metavar="FILE", help="the learner's .key file")
    actor.add_argument("--connect-timeout", type=float, default=30.0, metavar="SECONDS")
    actor.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: 1)")
    _add_allow_rewards(actor)
    _add_child_options(actor)
    actor.set_defaults(command=_actor)

    check = _with_config(
        commands.add_parser("check", help="validate a configuration and print it resolved")
    )
    check.set_defaults(command=_check)

    evaluate = _with_config(
        commands.add_parser("eval", help="score a model on held-out prompts, without a learner")
    )
    evaluate.add_argument(
        "--model", type=Path, help="checkpoint or run folder (default: the config's)"
    )
    evaluate.set_defaults(command=_evaluate)

    compare = _with_config(
        commands.add_parser("compare", help="train one recipe with several estimators and seeds")
    )
    compare.add_argument("--estimators", default="gdpo,grpo,grpo_no_std,grpo_batch_norm")
    compare.add_argument("--corrections", help="default: the configuration's")
    compare.add_argument(
        "--lags",
        type=_numbers,
        metavar="N,N,...",
        help="train each at these fixed stalenesses (they set training.max_staleness too)",
    )
    compare.add_argument("--seeds", type=_positive, default=5, help="how many (default: 5)")
    compare.add_argument("--out", type=Path, help="default: runs/compare-CONFIG")
    compare.add_argument("--jobs", type=_positive, help="runs at once (default: one per core)")
    compare.set_defaults(command=_compare)
    for command in (run, check, evaluate, compare):
        _add_allow_rewards(command)

    change = commands.add_parser("set", help="change weights and conditions of a run's rewards")
    change.add_argument("run", type=Path, metavar="FOLDER", help="of a run that is going on")
    change.add_argument(
        "assignments",
        nargs="*",
        metavar="rewards.NAME.KEY=value",
        help="weight=0.5, when='{ reward = \"correctness\", at_least = 1.0 }' or always=true; "
        "none: show what holds",
    )
    change.set_defaults(command=_set)

    top = commands.add_parser("top", help="watch a running learner, its actors and its weights")
    top.add_argument(
        "target",
        nargs="?",
        default="http://127.0.0.1:9400",
        metavar="TARGET",
        help="the run folder, or http://HOST:PORT of the learner's metrics (default: %(default)s)",
    )
    top.add_argument(
        "--interval",
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="from one look to the next (default: 1)",
    )
    top.add_argument(
        "--once", action="store_true", help="print it and leave; so it is without a terminal"
    )
    top.set_defaults(command=_top)

    journal = commands.add_parser("journal", help="print what the journal of a run holds")
    journal.add_argument("run", type=Path, metavar="FOLDER")
    journal.add_argument(
        "--replay",
        action="store_true",
        help="train on it again, without any actor, and compare the losses",
    )
    journal.set_defaults(command=_journal)

    keygen = commands.add_parser("keygen", help="make a key for a learner or an actor")
    keygen.add_argument("path", type=Path, metavar="PATH", help="writes PATH.key, PATH.key_secret")
    keygen.set_defaults(command=_keygen)

    plot = commands.add_parser("plot", help="draw the curves of a run or comparison again")
    plot.add_argument("run", type=Path, metavar="FOLDER")
    plot.set_defaults(command=_plot)
    return parser


def _add_resume(parser: argparse.ArgumentParser) -> None:
    # Its configuration is in the folder: what stands first may be an override.
    [config] = [action for action in parser._actions if action.dest == "config"]
    config.nargs = "?"
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="instead of CONFIG: go on with a run that was interrupted, or whose learner was lost",
    )


def _with_config(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="for example optimizer.lr=1e-6"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait")
    return seconds


def _numbers(text: str) -> tuple[int, ...]:
    """A comma-separated list of numbers from 0 on."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{min(numbers)} is below 0")
    return numbers


def _add_allow_rewards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-rewards",
        action="append",
        default=[],
        metavar="MODULE",
        help="import reward functions from this module too; may be repeated",
    )


def _add_child_options(parser: argparse.ArgumentParser) -> None:
    # The launcher holds the other end of standard input: when it dies, its children end too.
    parser.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)


# --- commands: each imports what it needs -------------------------------------------------------


def _run(options: Any) -> int:
    from deploy.launch.local import launch, require_actor_key
    from learner.run_folder import RunFolder

    if options.resume:
        config, folder = _resumed(options)
    else:
        config = _config(options)
    _import_rewards(config, options)
    require_actor_key(config)
    return launch(
        config,
        folder if options.resume else RunFolder.create(config),
        Path.cwd(),
        options.allow_rewards,
        resume_with=options.overrides if options.resume else None,
    )


def _learner(options: Any) -> int:
    from learner.run_folder import RunFolder

    if options.resume:
        config, folder = _resumed(options)
    else:
        config = _config(options)
        folder = RunFolder(options.run_folder) if options.run_folder else RunFolder.create(config)
    _start_logging()
    if config.training.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.training.threads)
    from deploy.launch.learner_process import run_with_display

    return run_with_display(
        config, folder, resume=options.resume is not None, as_child=options.exit_with_parent
    )


def _actor(options: Any) -> int:
    from protocol.keys import load_actor_keys

    keys = load_actor_keys(options.key, options.learner_key)
    _start_logging()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from actors.actor import ActorOptions
    from deploy.launch.actor_process import run_actor

    return run_actor(
        ActorOptions(
            learner=options.learner,
            metrics_port=options.metrics_port,
            metrics_host=options.metrics_host,
            connect_timeout_s=options.connect_timeout,
            keys=keys,
            allowed_modules=_allowed(options),
        ),
        threads=options.threads,
        as_child=options.exit_with_parent,
    )


def _check(options: Any) -> int:
    config = _load(options)
    config.load_keys()
    from learner.prompts.rows import check_rows
    from learner.training.policy import check_model

    check_rows(config.data.train, config.data.train_split)
    if config.data.heldout:
        check_rows(config.data.heldout, config.data.heldout_split)
    check_model(config)
    print(config.to_toml(), end="")
    return 0


def _evaluate(options: Any) -> int:
    config = _load(options)
    from deploy.results.evaluate import evaluate

    return evaluate(config, options.model, _allowed(options))


def _compare(options: Any) -> int:
    config = _load(options)
    from deploy.results.compare import Comparison, compare, parse_names
    from learner.config.algorithm import CorrectionName, EstimatorName

    corrections = options.corrections or config.algorithm.correction
    return compare(
        Comparison(
            config=options.config,
            overrides=tuple(options.overrides),
            estimators=parse_names(options.estimators, get_args(EstimatorName), "estimator"),
            corrections=parse_names(corrections, get_args(CorrectionName), "correction"),
            lags=options.lags or (None,),
            num_seeds=options.seeds,
            out=options.out or Path(config.runs_folder) / f"compare-{options.config.stem}",
            jobs=options.jobs or os.cpu_count() or 1,
            allowed_modules=tuple(options.allow_rewards),
        )
    )


def _set(options: Any) -> int:
    from deploy.watch.control import set_rewards

    set_rewards(options.run, options.assignments)
    return 0


def _top(options: Any) -> int:
    from deploy.watch.top import top

    return top(options.target, interval_s=options.interval, once=options.once)


def _journal(options: Any) -> int:
    from deploy.results.journal import print_journal, replay_journal

    if options.replay:
        return 0 if replay_journal(options.run) else FAILURE
    print_journal(options.run)
    return 0


def _keygen(options: Any) -> int:
    from protocol.keys import create_key

    public, secret = create_key(options.path)
    print(
        f"{secret}: the secret key. It stays on this machine, readable by you only.\n"
        f"  of a learner:  keys.secret={secret}\n"
        f"  of an actor:   gdpo actor --key {secret} ...\n"
        f"{public}: the public key, which the other side needs.\n"
        f"  of a learner:  to every actor's machine: gdpo actor --learner-key {public.name} ...\n"
        f"  of an actor:   into the learner's folder keys.allowed, at any time"
    )
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


def _load(options: Any) -> Any:
    """The configuration, with its reward functions imported to see that they are there."""
    config = _config(options)
    _import_rewards(config, options)
    return config


def _config(options: Any) -> Any:
    from learner.config.file import load_config

    if options.config is None:
        raise ConfigError("give a CONFIG file, or --resume FOLDER")
    return load_config(options.config, options.overrides)


def _resumed(options: Any) -> tuple[Any, Any]:
    """Configuration and folder of the run to go on with."""
    from learner.run_folder import RunFolder

    if options.config is not None:
        options.overrides.insert(0, str(options.config))
        options.config = None
    for override in options.overrides:
        if "=" not in override:
            raise ConfigError(f"--resume has its configuration: leave {override} out")
    folder, config = RunFolder.resume(options.resume, options.overrides)
    return config, folder


def _import_rewards(config: Any, options: Any) -> None:
    from actors.rewards.functions import load_reward

    for reward in config.rewards:
        load_reward(reward.function, _allowed(options), Path.cwd())


def _allowed(options: Any) -> tuple[str, ...]:
    """Modules that reward functions may come from, besides those in this folder."""
    from actors.rewards.functions import DEFAULT_MODULES

    return (*DEFAULT_MODULES, *options.allow_rewards)


class _CurrentStderr(logging.StreamHandler[Any]):
    """Writes to sys.stderr as it is at the moment: the live display puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _start_logging() -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[_CurrentStderr()],
    )
    for name in ("actor", "learner"):
        logging.getLogger(name).setLevel(logging.INFO)

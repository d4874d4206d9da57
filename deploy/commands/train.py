"""Commands that train: ``gdpo run``, ``gdpo learner`` and ``gdpo actor``."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.commands.options import (
    add_allow_rewards,
    add_config,
    allowed_modules,
    import_rewards,
    positive,
    read_config,
)
from deploy.logs import start_logging
from protocol.errors import ConfigError
from protocol.process import torchrun_rank

if TYPE_CHECKING:
    from deploy.commands.options import Commands
    from learner.config.run import RunConfig
    from learner.run_folder import RunFolder


def add_commands(commands: "Commands") -> None:
    """Add the commands of this module to the parser."""
    run = commands.add_parser("run", help="train on this machine: a learner and its actors")
    add_config(run, optional=True)
    _add_resume(run)
    add_allow_rewards(run)
    run.set_defaults(command=_run)

    learner = commands.add_parser("learner", help="start a learner; actors join it from anywhere")
    add_config(learner, optional=True)
    learner.add_argument("--run-folder", type=Path, help=argparse.SUPPRESS)
    _add_resume(learner)
    _add_child_options(learner)
    learner.set_defaults(command=_learner)

    actor = commands.add_parser("actor", help="join a running learner with one more actor")
    actor.add_argument(
        "--learner",
        required=True,
        metavar="tcp://HOST:PORT",
        help="address that the learner prints when it starts",
    )
    actor.add_argument(
        "--metrics-port",
        type=int,
        default=0,
        metavar="PORT",
        help="port of the HTTP pages; 0 (default): any free one",
    )
    actor.add_argument(
        "--metrics-host",
        default="127.0.0.1",
        metavar="HOST",
        help="interface of the HTTP pages (default: %(default)s)",
    )
    actor.add_argument("--key", type=Path, metavar="FILE", help="this actor's .key_secret file")
    actor.add_argument("--learner-key", type=Path, metavar="FILE", help="the learner's .key file")
    actor.add_argument(
        "--connect-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="longest wait for the learner's first answer (default: 30)",
    )
    actor.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)"
    )
    add_allow_rewards(actor)
    _add_child_options(actor)
    actor.set_defaults(command=_actor)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="instead of CONFIG: continue a run that was interrupted, or whose learner was lost",
    )


def _add_child_options(parser: argparse.ArgumentParser) -> None:
    # The launcher holds the other end of standard input: when it dies, its children end too.
    parser.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)


def _run(options: Any) -> int:
    from deploy.launch.local import launch, require_actor_key
    from learner.run_folder import RunFolder

    if options.resume:
        config, folder = _resumed(options)
    else:
        config = read_config(options)
    import_rewards(config, options)
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

    if torchrun_rank()[1] > 1:
        raise ConfigError(
            "this is a learner of one process; start one on several ranks with: "
            "torchrun --nproc-per-node N -m learner CONFIG"
        )
    if options.resume:
        config, folder = _resumed(options)
    else:
        config = read_config(options)
        folder = RunFolder(options.run_folder) if options.run_folder else RunFolder.create(config)
    start_logging()
    if config.training.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.training.threads)
    from deploy.launch.learner_process import run_with_display

    return run_with_display(
        config, folder, resume=options.resume is not None, as_child=options.exit_with_parent
    )


def _actor(options: Any) -> int:
    from protocol.keys import load_actor_keys

    keys = load_actor_keys(options.key, options.learner_key)
    start_logging()
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
            allowed_modules=allowed_modules(options),
        ),
        threads=options.threads,
        as_child=options.exit_with_parent,
    )


def _resumed(options: Any) -> "tuple[RunConfig, RunFolder]":
    """Find configuration and folder of the run to continue."""
    from learner.run_folder import RunFolder

    if options.config is not None:
        # The configuration is in the folder: what stands first is an override.
        options.overrides.insert(0, options.config)
        options.config = None
    for override in options.overrides:
        if "=" not in override:
            raise ConfigError(f"--resume has its configuration: leave {override} out")
    folder, config = RunFolder.resume(options.resume, options.overrides)
    return config, folder

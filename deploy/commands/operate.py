"""Commands around a run: ``gdpo check``, ``set``, ``top`` and ``keygen``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.commands.options import add_allow_rewards, add_config, load, seconds
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from deploy.commands.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the commands of this module to the parser."""
    check = commands.add_parser("check", help="validate a configuration and print it resolved")
    add_config(check, optional=True)
    check.add_argument(
        "--explain",
        metavar="KEY",
        help="print what a key means, its type, range and default, or the keys of a section",
    )
    add_allow_rewards(check)
    check.set_defaults(command=_check)

    change = commands.add_parser("set", help="change weights and conditions of a run's rewards")
    change.add_argument(
        "run", type=Path, metavar="FOLDER", help="the folder of a run that is going on"
    )
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
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="from one look to the next (default: 1)",
    )
    top.add_argument(
        "--once", action="store_true", help="print it and leave; without a terminal it always does"
    )
    top.set_defaults(command=_top)

    keygen = commands.add_parser("keygen", help="make a key for a learner or an actor")
    keygen.add_argument("path", type=Path, metavar="PATH", help="writes PATH.key, PATH.key_secret")
    keygen.set_defaults(command=_keygen)


def _check(options: Any) -> int:
    if options.explain is not None:
        from learner.config.schema import explain

        print(explain(options.explain))
        return 0
    if options.config is None:
        raise ConfigError("give a CONFIG file, or --explain KEY")
    config = load(options)
    config.load_keys()
    from learner.prompts.rows import check_rows
    from learner.training.policy import check_model

    check_rows(config.data.train, config.data.train_split)
    for source in sorted({(heldout.source, heldout.split) for heldout in config.heldout_sets}):
        check_rows(*source)
    check_model(config)
    print(config.to_toml(), end="")
    return 0


def _set(options: Any) -> int:
    from deploy.watch.control import set_rewards

    set_rewards(options.run, options.assignments)
    return 0


def _top(options: Any) -> int:
    from deploy.watch.top import top

    return top(options.target, interval_s=options.interval, once=options.once)


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

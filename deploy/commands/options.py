"""Options that several commands have, and what becomes of them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from protocol.errors import ConfigError

if TYPE_CHECKING:
    from learner.config.run import RunConfig

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the configuration file and its overrides; `load` and `read_config` read them."""
    nargs = "?" if optional else None
    # No Path yet: after --resume the first override stands here, and a Path would change its "//".
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help="a TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="for example optimizer.lr=1e-6"
    )


def add_allow_rewards(parser: argparse.ArgumentParser) -> None:
    """Add the option that allows further modules of reward functions."""
    parser.add_argument(
        "--allow-rewards",
        action="append",
        default=[],
        metavar="MODULE",
        help="import reward functions from this module too; may be repeated",
    )


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def seconds(text: str) -> float:
    """Parse a time to wait."""
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait")
    return number


def numbers(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of numbers from 0 on."""
    try:
        parsed = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None
    if min(parsed) < 0:
        raise argparse.ArgumentTypeError(f"{min(parsed)} is below 0")
    return parsed


def load(options: Any) -> "RunConfig":
    """Read the configuration, and import its reward functions to see that they are there."""
    config = read_config(options)
    import_rewards(config, options)
    return config


def read_config(options: Any) -> "RunConfig":
    """Read the configuration file with its overrides; raises `ConfigError`."""
    from learner.config.file import load_config

    if options.config is None:
        raise ConfigError("give a CONFIG file, or --resume FOLDER")
    return load_config(Path(options.config), options.overrides)


def import_rewards(config: "RunConfig", options: Any) -> None:
    """Import every reward function, as actors will; raises `RewardError` where one cannot be."""
    from actors.rewards.functions import load_reward

    for reward in config.rewards:
        load_reward(reward.function, allowed_modules(options), Path.cwd())


def allowed_modules(options: Any) -> tuple[str, ...]:
    """List the modules that reward functions may come from, besides those in this folder."""
    from actors.rewards.functions import DEFAULT_MODULES

    return (*DEFAULT_MODULES, *options.allow_rewards)

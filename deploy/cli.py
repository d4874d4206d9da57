"""The `gdpo` command. Parsing imports nothing heavy: ``--help`` answers at once."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from deploy import FAILURE, INTERRUPTED, USER_ERROR
from deploy.commands import operate, study, train
from protocol.errors import AsyncGdpoError, ConfigError, RewardError
from protocol.process import leave


def run() -> NoReturn:
    """Run the command as a process."""
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
    parser = make_parser()
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


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line; ``command`` of a result runs it."""
    parser = argparse.ArgumentParser(
        prog="gdpo", description="Asynchronous multi-reward reinforcement learning with GDPO."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print it and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (train, study, operate):
        module.add_commands(commands)
    return parser

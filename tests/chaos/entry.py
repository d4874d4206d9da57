"""``gdpo`` for tests: the product's own command, with a recorder, a toy engine, a crash point.

python -m tests.chaos.entry --toy --at upload:20 --do kill --mark FILE -- actor --learner URL
"""

import argparse
import sys
from pathlib import Path

from deploy.cli import main
from protocol.process import leave
from tests.chaos.points import POINTS, arm
from tests.chaos.record import Record, record_actor, record_learner


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos.entry")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--toy", action="store_true", help="generate without a model")
    parser.add_argument("--group-s", type=float, default=0.2)
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument("--at", metavar="POINT:N", help=" ".join(POINTS))
    parser.add_argument("--do", choices=["kill", "stop", "term", "hang"])
    parser.add_argument("--mark", type=Path, help="written when the point is reached")
    parser.add_argument("gdpo", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = [word for word in options.gdpo if word != "--"]
    record = Record(options.record) if options.record else None
    if record is not None and command[0] == "learner":
        record_learner(record)
    if record is not None and command[0] == "actor":
        record_actor(record)
    if options.toy:
        from tests.chaos.toy import Toy, use_toy

        use_toy(Toy(group_s=options.group_s, start_s=options.start_s, record=record))
    if options.at:
        point, _, call = options.at.partition(":")
        arm(point, int(call), options.do, options.mark)
    return main(command)


if __name__ == "__main__":
    leave(run(sys.argv[1:]))

"""``python -m learner`` for tests, under torchrun: rank 1 has a fatal moment.

torchrun --nproc-per-node 2 -m tests.chaos.rank --at rank.gather:9 --do kill --mark FILE -- CONFIG
"""

import argparse
import os
import sys
from pathlib import Path

from learner.__main__ import main
from protocol.process import leave
from tests.chaos.points import arm


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos.rank")
    parser.add_argument("--at", metavar="POINT:N", required=True)
    parser.add_argument("--do", choices=["kill", "stop", "hang"], required=True)
    parser.add_argument("--mark", type=Path, required=True, help="written at that moment")
    parser.add_argument("learner", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if os.environ["RANK"] == "1":
        point, _, call = options.at.partition(":")
        arm(point, int(call), options.do, options.mark)
    return main([word for word in options.learner if word != "--"])


if __name__ == "__main__":
    leave(run(sys.argv[1:]))

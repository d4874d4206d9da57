"""One part, in its process: python -m benchmarks.gpu.part NAME [--dry].

Prints lines of JSON: ``{"row": ..., "figures": {...}}`` or ``{"skip": why}``. ``--dry`` is the same
program on something tiny and a CPU.
"""

import argparse
import importlib
import json
from collections.abc import Callable

from benchmarks.gpu.report import Report, Skip, print_row

PARTS = {
    "machine": "benchmarks.gpu.machine:report",
    "step varlen": "benchmarks.gpu.step:report",
    "layouts": "benchmarks.gpu.layouts:report",
    "tests": "benchmarks.gpu.system:run_tests",
    "loop": "benchmarks.gpu.system:run_loop",
    "shared memory": "benchmarks.gpu.routes:shared_memory",
    "nccl": "benchmarks.gpu.routes:nccl",
    "step flash2": "benchmarks.gpu.step:report",
    "step sdpa": "benchmarks.gpu.step:report",
    "step flash4": "benchmarks.gpu.step:report",
    "step flex": "benchmarks.gpu.step:report",
}
"""The function of each part; it gets what stands behind the first word of the name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    module, _, function = PARTS[options.name].partition(":")
    try:
        run: Callable[[Report, str, bool], None] = getattr(
            importlib.import_module(module), function
        )
        run(print_row, options.name.partition(" ")[2], options.dry)
    except Skip as skip:
        print(json.dumps({"skip": str(skip)}), flush=True)
    except ModuleNotFoundError as missing:
        print(json.dumps({"skip": f"{missing.name} is not installed"}), flush=True)


if __name__ == "__main__":
    main()

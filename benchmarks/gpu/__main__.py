"""Everything that a GPU can tell about this system, in one call of less than eight minutes.

    make gpu
    python -m benchmarks.gpu --parts "step varlen" layouts
    python -m benchmarks.gpu --dry          # the same programs, tiny and on a CPU

Prints rows as they come and one table last, and writes a JSON file. Parts that cannot run here are
in the table with the reason. The exit code is 0 unless a part failed or was cut off: then 1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

from benchmarks.gpu.part import PARTS

ROOT = Path(__file__).parents[2]
TOTAL_S = 465.0
"""For all parts together."""
LIMIT_S = {"step varlen": 110.0, "layouts": 90.0, "loop": 80.0, "tests": 75.0}
"""For one part; the others have `OTHER_LIMIT_S`."""
OTHER_LIMIT_S = 60.0
LEAST_S = 5.0
"""With less than that left, a part is not begun."""

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    options = parse(arguments)
    deadline = time.monotonic() + options.total
    rows: list[Row] = []
    for name in options.parts:
        left = deadline - time.monotonic()
        if reason := why_not(rows, left, options.dry):
            rows.append({"part": name, "skip": reason})
            continue
        limit = min(left, LIMIT_S.get(name, OTHER_LIMIT_S))
        for row in run_part(name, limit, dry=options.dry):
            rows.append({"part": name, **row})
            print(text(rows[-1]), flush=True)
    print("\n" + table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1))
    print(f"figures: {options.out}")
    return int(any("failed" in row for row in rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; without options everything runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--total", type=float, default=TOTAL_S, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    return parser.parse_args(arguments)


def why_not(rows: Sequence[Row], left: float, dry: bool) -> str:
    """Return why no further part can run; empty if one can."""
    machine = next((row for row in rows if row["part"] == "machine"), None)
    if machine is not None and not dry and not machine.get("figures", {}).get("gpu"):
        return f"no GPU ({machine.get('skip') or machine.get('failed') or 'torch sees none'})"
    return "" if left >= LEAST_S else "no time left"


def run_part(name: str, limit_s: float, *, dry: bool) -> Iterator[Row]:
    """Run one part in a process of its own; yields its rows, and how it failed if it did."""
    command = [sys.executable, "-m", "benchmarks.gpu.part", name, *(["--dry"] if dry else [])]
    log = ROOT / "runs" / "gpu" / f"{name.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    late = Timer(limit_s, end_group, [process])
    late.start()
    try:
        with process.stdout:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        process.wait()
    finally:
        late.cancel()
        end_group(process)
        process.wait()
    if process.returncode:
        yield {"failed": how_it_ended(process.returncode, log, limit_s)}


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill a part with what it started; nothing happens if it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def how_it_ended(code: int, log: Path, limit_s: float) -> str:
    """Return the last line of its errors, or that it was killed."""
    if code == -9:
        return f"killed, after {limit_s:.0f} s or for want of memory"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no message'} (see {log})"


def table(rows: Sequence[Row]) -> str:
    """Return a line for each row, figures in columns of their own width."""
    cells = [(row["part"], row.get("row", ""), figures(row)) for row in rows]
    widths = [max([len(cell[i]) for cell in cells], default=0) for i in range(2)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in cells]
    return "\n".join(lines)


def text(row: Row) -> str:
    """Return a row as a line."""
    return ": ".join(part for part in (row["part"], row.get("row", ""), figures(row)) if part)


def figures(row: Row) -> str:
    """Return what a row says: figures, or why there are none."""
    for kind in ("skip", "failed"):
        if kind in row:
            return f"{'skipped' if kind == 'skip' else 'FAILED'}: {row[kind]}"
    return ", ".join(f"{name} {value}" for name, value in row["figures"].items())


if __name__ == "__main__":
    sys.exit(main())

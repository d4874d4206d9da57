"""Make a bundle: python -m tools.bundle, see there for the options."""

import argparse
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from tools.bundle.archive import describe, pack, split, write_sums
from tools.bundle.collect import BundleError, Collector, read_pins, wheel_name
from tools.bundle.target import Target

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
LARGE = 12
"""Wheels of which the size is printed, the largest ones."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the bundle; returns the exit code."""
    options = parse(arguments)
    try:
        target = Target(options.python, options.platform)
        make(options, target)
    except (ValueError, BundleError) as error:
        print(f"bundle: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; the defaults are a machine like this one, and everything in one file."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    machine = sysconfig.get_platform().rpartition("-")[2]
    parser = argparse.ArgumentParser(prog="python -m tools.bundle", description=__doc__)
    parser.add_argument("--python", default=here, metavar="3.N", help="of the target")
    parser.add_argument("--platform", default=f"manylinux_2_28_{machine}", help="of the target")
    parser.add_argument(
        "--without",
        nargs="*",
        type=canonicalize_name,
        default=[],
        metavar="PACKAGE",
        help="left out, with what only they need",
    )
    parser.add_argument("--extras", nargs="*", default=[], metavar="EXTRA", help="such as vllm")
    parser.add_argument("--part-mib", type=int, metavar="N", help="cut into parts of so many MiB")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER")
    parser.add_argument("--wheel", type=Path, help="in place of the one built from here")
    return parser.parse_args(arguments)


def make(options: argparse.Namespace, target: Target) -> None:
    """Collect, describe, pack and cut, and say what there is."""
    root = options.wheel or build_wheel(options.out)
    folder = options.out / f"{root.name.partition('-py3')[0]}-{target.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    collector = Collector(
        folder, target, without=options.without, pins=read_pins(ROOT / "constraints.txt")
    )
    wheels = collector.collect(Path(shutil.copy(root, folder)), options.extras)
    print_sizes(wheels)
    for name in sorted({*options.without} - collector.left_out):
        print(f"{name}: nothing here needs it")
    line = describe(folder, wheel_name(root), sorted(collector.left_out))
    tar = pack(folder)
    files = split(tar, options.part_mib * MIB) if options.part_mib else [tar]
    sums = write_sums(files)
    for file in [*files, sums]:
        print(f"{file.stat().st_size / MIB:9.1f} MiB  {file}")
    unpack = f"cat {tar.name}.[0-9]* | tar x" if options.part_mib else f"tar xf {tar.name}"
    print(f"there:    sha256sum --check --quiet {sums.name} && {unpack}")
    print(f"          cd {folder.name} && {line}")


def build_wheel(out: Path) -> Path:
    """Build the wheel of this repository."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet"]
    done = subprocess.run([*command, f"--wheel-dir={out}"], capture_output=True, text=True)
    if done.returncode:
        raise BundleError(done.stderr)
    return max(out.glob("async_gdpo-*.whl"), key=lambda path: path.stat().st_mtime)


def print_sizes(wheels: Sequence[Path]) -> None:
    """Print the sizes of the largest ones and of all together."""
    sizes = sorted(((wheel.stat().st_size, wheel.name) for wheel in wheels), reverse=True)
    for size, name in sizes[:LARGE]:
        print(f"{size / MIB:9.1f} MiB  {name}")
    if len(sizes) > LARGE:
        rest = sum(size for size, _ in sizes[LARGE:])
        print(f"{rest / MIB:9.1f} MiB  {len(sizes) - LARGE} others")
    print(f"{sum(size for size, _ in sizes) / MIB:9.1f} MiB  {len(sizes)} wheels in all")


if __name__ == "__main__":
    sys.exit(main())

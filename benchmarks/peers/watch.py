"""A process with all that it started: the most memory that each one had, read from /proc."""

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")


class Watch:
    """Keeps the peak of every process below a given one; call `look` now and then."""

    def __init__(self, root: int) -> None:
        """``root`` is the id of the process that started the others."""
        self._root = root
        self._peaks: dict[int, tuple[str, int]] = {}

    def look(self) -> None:
        """Read the peaks so far."""
        for pid in family(self._root):
            if (peak := peak_bytes(pid)) is not None:
                self._peaks[pid] = (role(command_line(pid)), peak)

    @property
    def peaks(self) -> dict[str, list[int]]:
        """Bytes of each process, the largest first, by its role."""
        found: dict[str, list[int]] = {}
        for name, peak in self._peaks.values():
            found.setdefault(name, []).append(peak)
        return {name: sorted(peaks, reverse=True) for name, peaks in sorted(found.items())}


def family(root: int) -> Iterator[int]:
    """Yield a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (parent := parent_of(int(entry.name))) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def parent_of(pid: int) -> int | None:
    """Return a process's parent; None if it has ended."""
    found = status(pid, "PPid")
    return None if found is None else int(found)


def peak_bytes(pid: int) -> int | None:
    """Return the most resident memory that a process had; None if it has ended."""
    found = status(pid, "VmHWM")
    return None if found is None else 1024 * int(found.split()[0])


def command_line(pid: int) -> list[str]:
    """Return its arguments; none if it has ended."""
    try:
        return (PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def status(pid: int, field: str) -> str | None:
    """Return a field of its status; None if it has ended, or has no such field."""
    try:
        lines = (PROC / str(pid) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def role(arguments: list[str]) -> str:
    """Return what a process is there for: ``learner``, ``actor``, ``rewards``, ``trainer`` ..."""
    if any("actors.rewards" in argument for argument in arguments):
        return "rewards"
    if "benchmarks.peers.with_trl" in arguments:
        return "trainer"
    if "deploy" not in arguments:
        return "other"
    [command] = arguments[arguments.index("deploy") + 1 :][:1] or ["launcher"]
    return "launcher" if command == "run" else command

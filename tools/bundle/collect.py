"""From one wheel to all that it needs on the target."""

import email
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from tools.bundle.target import Target

TIMEOUT_S = 3600.0
"""Limit of one call of pip: on slow links large wheels take long."""


class BundleError(Exception):
    """A bundle cannot be made; the text says why."""


class Collector:
    """Brings wheels into a folder until nothing is missing."""

    def __init__(
        self,
        folder: Path,
        target: Target,
        *,
        without: Collection[str] = (),
        pins: Mapping[str, str] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Leave out ``without`` and what only that needs; prefer the versions of ``pins``."""
        self._folder = folder
        self._target = target
        self._without = {canonicalize_name(name) for name in without}
        self._pins = pins or {}
        self._say = say
        self._specifiers: dict[str, SpecifierSet] = {}
        self._extras: dict[str, set[str]] = {}
        self._wheels: dict[str, Path] = {}
        self.left_out: set[str] = set()
        """Names of ``without`` that something needs."""

    def collect(self, root: Path, extras: Iterable[str] = ()) -> list[Path]:
        """Return all wheels, with ``root`` first, in which the package itself is.

        Raises `BundleError`, with what pip said, where a wheel is not to be had.
        """
        name = wheel_name(root)
        self._wheels[name], self._extras[name] = root, set(extras)
        waiting = {name}
        while waiting:
            if missing := sorted(name for name in waiting if not self._fits(name)):
                self._say(f"{len(self._wheels)} packages; next: {', '.join(missing)}")
                self._download(missing)
            waiting = set[str]().union(*(self._require(name) for name in sorted(waiting)))
        return [root, *self._reached(name)]

    def _fits(self, name: str) -> bool:
        """Whether its wheel is here, in a version that is asked for."""
        asked = self._specifiers.get(name, SpecifierSet())
        wheel = self._wheels.get(name)
        return wheel is not None and asked.contains(wheel_version(wheel), prereleases=True)

    def _require(self, name: str) -> set[str]:
        """Note what a package needs; returns of that what has to be looked at."""
        news: set[str] = set()
        for requirement in self._requirements(name):
            needed, extras = canonicalize_name(requirement.name), requirement.extras
            if needed in self._without:
                self.left_out.add(needed)
                continue
            asked = self._specifiers.get(needed, SpecifierSet()) & requirement.specifier
            known = self._extras.setdefault(needed, set())
            self._specifiers[needed] = asked
            if not extras <= known or not self._fits(needed):
                news.add(needed)
            known |= extras
        return news

    def _requirements(self, name: str) -> list[Requirement]:
        requirements, extras = wheel_requirements(self._wheels[name]), self._extras[name]
        return [r for r in requirements if self._target.holds(r, extras)]

    def _download(self, names: Sequence[str]) -> None:
        """Get the wheels of ``names``, in place of what is there of them."""
        for name in names:
            if name in self._wheels:
                self._wheels.pop(name).unlink()
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *(f"--dest={self._folder}", *self._target.pip_options),
            *(f"{name}{self._pinned(name)}" for name in names),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            errors = re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE)
            raise BundleError("; ".join(errors) or done.stderr)
        for wheel in self._folder.glob("*.whl"):
            self._wheels[wheel_name(wheel)] = wheel

    def _pinned(self, name: str) -> SpecifierSet:
        """The versions asked for, or of these the tested one."""
        specifiers, pin = self._specifiers[name], self._pins.get(name)
        if pin is not None and specifiers.contains(pin, prereleases=True):
            return SpecifierSet(f"=={pin}")
        return specifiers

    def _reached(self, root: str) -> list[Path]:
        """Wheels that the chosen versions need; others that came on the way are deleted."""
        reached, waiting = {root}, [root]
        while waiting:
            name = waiting.pop()
            for requirement in self._requirements(name):
                needed = canonicalize_name(requirement.name)
                if needed in self._wheels and needed not in reached:
                    reached.add(needed)
                    waiting.append(needed)
        for name in self._wheels.keys() - reached:
            self._wheels.pop(name).unlink()
        return [self._wheels[name] for name in sorted(reached - {root})]


def read_pins(constraints: Path) -> dict[str, str]:
    """Read lines like ``numpy==2.4.0``."""
    pins: dict[str, str] = {}
    for line in constraints.read_text().splitlines():
        name, _, version = line.partition("==")
        pins[canonicalize_name(name)] = version.strip()
    return pins


def wheel_name(wheel: Path) -> str:
    """Return the canonical name of the package in a wheel."""
    return parse_wheel_filename(wheel.name)[0]


def wheel_version(wheel: Path) -> Version:
    """Return its version."""
    return parse_wheel_filename(wheel.name)[1]


def wheel_requirements(wheel: Path) -> list[Requirement]:
    """Return what it needs, on whatever machine."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        metadata = email.message_from_bytes(archive.read(name))
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]

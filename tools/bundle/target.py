"""The machine that a bundle is for: which wheels fit it, and which requirements hold on it."""

import re
from dataclasses import dataclass

from packaging.requirements import Requirement

OLDEST_GLIBC = {"x86_64": 5, "i686": 5}
"""The first minor version of glibc 2 that wheels were built for; 17 on every other processor."""
OLDER_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
PLATFORM = re.compile(
    r"(manylinux_2_(?P<glibc>\d+)|manylinux(?:1|2010|2014)|musllinux_\d+_\d+|linux|macosx_\d+_\d+)"
    r"_(?P<machine>\w+)"
)
# Of markers, by whether the platform is a Mac.
SYSTEMS = {
    True: {"sys_platform": "darwin", "platform_system": "Darwin"},
    False: {"sys_platform": "linux", "platform_system": "Linux"},
}


@dataclass(frozen=True)
class Target:
    """A Python version, such as 3.11, and a platform, such as manylinux_2_28_x86_64."""

    python: str
    platform: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"3\.\d+(\.\d+)?", self.python):
            raise ValueError(f"{self.python!r} is no Python version: write 3.11, for example")
        if PLATFORM.fullmatch(self.platform) is None:
            raise ValueError(
                f"{self.platform!r} is no platform: write manylinux_2_28_x86_64, for example"
            )

    @property
    def name(self) -> str:
        """A name for files."""
        return f"py{self.python}-{self.platform}"

    @property
    def platforms(self) -> list[str]:
        """Every platform whose wheels run on it, its own first.

        A wheel for an older glibc runs on a newer one, which pip does not conclude by itself.
        """
        found = PLATFORM.fullmatch(self.platform)
        assert found is not None
        if found["glibc"] is None:
            return [self.platform]
        newest, machine = int(found["glibc"]), found["machine"]
        names = []
        for minor in range(newest, OLDEST_GLIBC.get(machine, 17) - 1, -1):
            names.append(f"manylinux_2_{minor}_{machine}")
            if minor in OLDER_NAMES:
                names.append(f"{OLDER_NAMES[minor]}_{machine}")
        return [*names, f"linux_{machine}"]

    @property
    def pip_options(self) -> list[str]:
        """What makes pip choose wheels for it."""
        platforms = [f"--platform={platform}" for platform in self.platforms]
        return [
            *("--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"),
            *platforms,
        ]

    def holds(self, requirement: Requirement, extras: set[str]) -> bool:
        """Whether the marker of a requirement of a package holds, with some extras of that one."""
        marker = requirement.marker
        return marker is None or any(
            marker.evaluate({**self._markers, "extra": extra}) for extra in {"", *extras}
        )

    @property
    def _markers(self) -> dict[str, str]:
        """Everything that a marker may ask for."""
        found = PLATFORM.fullmatch(self.platform)
        assert found is not None
        full = self.python if self.python.count(".") == 2 else f"{self.python}.0"
        return {
            **SYSTEMS[self.platform.startswith("macosx")],
            "python_version": ".".join(self.python.split(".")[:2]),
            "python_full_version": full,
            "implementation_version": full,
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "platform_machine": found["machine"],
            "platform_release": "",
            "platform_version": "",
        }

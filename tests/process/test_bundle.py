"""`make bundle`: what a target needs and nothing else, from a folder in place of an index."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.bundle.__main__ import main
from tools.bundle.target import Target

LINUX = ["--python", "3.11", "--platform", "manylinux_2_28_x86_64"]
NAME = "demo-1.0-py3.11-manylinux_2_28_x86_64"


def make_wheel(
    folder: Path, name: str, version: str, *requires: str, tags: str = "py3-none-any", size: int = 0
) -> Path:
    path = folder / f"{name}-{version}-{tags}.whl"
    info = f"{name}-{version}.dist-info"
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    files = {
        f"{name}.bin": "x" * size,
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", *lines]) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n",
    }
    record = "".join(f"{file},,\n" for file in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    # The habits of this machine.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def bundle(tmp_path: Path, root: Path, *options: str) -> list[str]:
    out = tmp_path / "out"
    assert main(["--wheel", str(root), "--out", str(out), *LINUX, *options]) == 0
    return sorted(path.name for path in (out / NAME).glob("*.whl"))


def test_the_markers_are_asked_of_the_target_and_not_of_this_machine(tmp_path: Path, index: Path):
    root = make_wheel(
        tmp_path,
        "demo",
        "1.0",
        'old; python_version < "3.12"',
        'new; python_version >= "3.12"',
        'mac; sys_platform == "darwin"',
        'arm; platform_machine == "aarch64"',
    )
    for name in ("old", "new", "mac", "arm"):
        make_wheel(index, name, "1.0")
    assert bundle(tmp_path, root) == ["demo-1.0-py3-none-any.whl", "old-1.0-py3-none-any.whl"]


def test_a_wheel_for_another_python_or_a_newer_glibc_is_passed_over(tmp_path: Path, index: Path):
    root = make_wheel(tmp_path, "demo", "1.0", "lib")
    make_wheel(index, "lib", "1.0", tags="cp311-cp311-manylinux_2_17_x86_64")
    make_wheel(index, "lib", "2.0", tags="cp311-cp311-manylinux_2_34_x86_64")
    make_wheel(index, "lib", "3.0", tags="cp313-cp313-manylinux_2_17_x86_64")
    make_wheel(index, "lib", "4.0", tags="cp311-cp311-macosx_11_0_arm64")
    assert "lib-1.0-cp311-cp311-manylinux_2_17_x86_64.whl" in bundle(tmp_path, root)


def test_what_only_a_package_left_out_needs_is_left_out_too(tmp_path: Path, index: Path):
    root = make_wheel(tmp_path, "demo", "1.0", "torch", "both")
    make_wheel(index, "both", "1.0")
    # There is no wheel of torch or cuda: nobody may look for one.
    assert bundle(tmp_path, root, "--without", "Torch") == [
        "both-1.0-py3-none-any.whl",
        "demo-1.0-py3-none-any.whl",
    ]
    how = (tmp_path / "out" / NAME / "INSTALL.txt").read_text()
    assert "--no-deps" in how
    assert "to be there already: torch" in how


def test_a_version_fits_everybody_who_needs_it(tmp_path: Path, index: Path):
    root = make_wheel(tmp_path, "demo", "1.0", "middle", "lib")
    make_wheel(index, "middle", "1.0", "lib<2")
    make_wheel(index, "lib", "1.5", "kept")
    make_wheel(index, "lib", "2.0", "gone")
    make_wheel(index, "kept", "1.0")
    make_wheel(index, "gone", "1.0")
    # lib 2.0 came first, and what it needs with it.
    assert bundle(tmp_path, root) == [
        "demo-1.0-py3-none-any.whl",
        "kept-1.0-py3-none-any.whl",
        "lib-1.5-py3-none-any.whl",
        "middle-1.0-py3-none-any.whl",
    ]


def test_the_needs_of_an_extra_come_only_when_it_is_asked_for(tmp_path: Path, index: Path):
    root = make_wheel(tmp_path, "demo", "1.0", 'lib[fast]; extra == "big"', "lib")
    make_wheel(index, "lib", "1.0", 'speed; extra == "fast"')
    make_wheel(index, "speed", "1.0")
    assert "speed-1.0-py3-none-any.whl" not in bundle(tmp_path, root)
    assert "speed-1.0-py3-none-any.whl" in bundle(tmp_path, root, "--extras", "big")


def test_a_wheel_that_is_not_to_be_had_is_one_clear_line(
    tmp_path: Path, index: Path, capsys: pytest.CaptureFixture[str]
):
    root = make_wheel(tmp_path, "demo", "1.0", "nowhere>=3")
    assert main(["--wheel", str(root), "--out", str(tmp_path / "out"), *LINUX]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("bundle: error: ")
    assert "nowhere>=3" in line


def test_the_parts_are_small_enough_and_make_the_tar_again(
    tmp_path: Path, index: Path, capsys: pytest.CaptureFixture[str]
):
    root = make_wheel(tmp_path, "demo", "1.0", size=5 << 19)
    bundle(tmp_path, root, "--part-mib", "1")
    out = tmp_path / "out"
    parts = sorted(out.glob("*.tar.[0-9]*"))
    # 2.5 MiB of wheel, and the blocks of the tar.
    assert [part.stat().st_size for part in parts[:2]] == [1 << 20, 1 << 20]
    assert len(parts) == 3
    lines = capsys.readouterr().out.splitlines()
    [unpack] = [line.removeprefix("there:") for line in lines if line.startswith("there:")]
    (out / NAME).rename(out / "before")
    subprocess.run(unpack, shell=True, check=True, cwd=out)
    for name in ("SHA256SUMS", root.name):
        assert (out / NAME / name).read_bytes() == (out / "before" / name).read_bytes()
    digest = hashlib.sha256(root.read_bytes()).hexdigest()
    assert (out / NAME / "SHA256SUMS").read_text() == f"{digest}  {root.name}\n"


def test_the_line_that_is_printed_installs_it(
    tmp_path: Path, index: Path, capsys: pytest.CaptureFixture[str]
):
    root = make_wheel(tmp_path, "demo", "1.0", "lib")
    make_wheel(index, "lib", "1.0")
    bundle(tmp_path, root)
    line = capsys.readouterr().out.splitlines()[-1].strip()
    into = tmp_path / "into"
    # Where the test's own packages are not.
    line = line.replace("pip install", f"{sys.executable} -m pip install -q --target {into}")
    subprocess.run(line, shell=True, check=True, cwd=tmp_path / "out")
    assert {path.name for path in into.glob("*.bin")} == {"demo.bin", "lib.bin"}


@pytest.mark.parametrize(
    ("python", "platform"), [("python3", "linux_x86_64"), ("3.11", "x86_64"), ("3.11", "win_amd64")]
)
def test_a_target_that_is_none_is_refused(python: str, platform: str):
    with pytest.raises(ValueError, match="is no"):
        Target(python, platform)


def test_older_manylinux_wheels_fit_down_to_the_first():
    platforms = Target("3.12", "manylinux_2_28_aarch64").platforms
    assert platforms[0] == "manylinux_2_28_aarch64"
    assert platforms[-3:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"]


def test_a_mac_is_asked_as_a_mac():
    target = Target("3.12", "macosx_14_0_arm64")
    assert target.holds(Requirement('a; sys_platform == "darwin"'), set())
    assert target.holds(Requirement('a; platform_machine == "arm64" and extra == "x"'), {"x"})
    assert not target.holds(Requirement('a; extra == "x"'), set())

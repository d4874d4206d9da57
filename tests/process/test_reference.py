"""Pages made from the code: they are as it says, and a change of it that they miss is found."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import reference

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "actors",
    "deploy",
    "gdpo",
    "learner",
    "protocol",
    "tools",
    "transfer",
    "docs/reference",
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The code and its pages, to change."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.reference", "--check"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "40"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_the_pages_are_what_the_code_says():
    assert reference.main(["--check"]) == 0


@pytest.mark.timeout(120)
def test_a_changed_docstring_help_or_metric_is_found(copy):
    replace(copy / "learner/config/training.py", "Training batches in the run.", "Changed.")
    result = check(copy)
    assert result.returncode == 1
    assert result.stderr == (
        "configuration.md in docs/reference: not what the code says; "
        "run python -m tools.reference\n"
    )
    replace(copy / "deploy/commands/operate.py", "from one look to the next", "changed")
    replace(copy / "actors/metrics.py", "Groups finished and scored", "Changed")
    result = check(copy)
    assert result.returncode == 1
    assert result.stderr.startswith("configuration.md, commands.md, metrics.md in docs/reference")


def test_what_is_written_is_what_is_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    assert reference.main(["--check"]) == 1
    assert "run python -m tools.reference" in capsys.readouterr().err
    assert not (tmp_path / "reference").exists()
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    assert len(list((tmp_path / "reference").iterdir())) == 3


def test_every_metric_that_the_code_names_is_on_the_page():
    sources = [
        path.read_text()
        for folder in ("learner", "actors")
        for path in (ROOT / folder).rglob("*.py")
    ]
    named = {
        name
        for source in sources
        if "prometheus_client" in source
        for name in re.findall(r'"(gdpo_[a-z0-9_]+)"', source)
    }
    assert len(named) > 60
    page = reference.pages()["metrics.md"]
    assert [name for name in sorted(named) if not re.search(f"`{name}(_total)?`", page)] == []


def test_pages_name_no_folder_of_this_machine():
    assert all(str(ROOT) not in text for text in reference.pages().values())

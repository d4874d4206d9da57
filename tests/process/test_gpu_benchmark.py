"""`make gpu` without a GPU: each part in its dry form, and a table whatever becomes of them."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import part

pytestmark = pytest.mark.timeout(240)


def run(tmp_path: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    out = tmp_path / "gpu.json"
    code = program.main(["--out", str(out), *options])
    return code, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in part.PARTS if not name.startswith("step fl")])
def test_every_part_runs_dry(name: str, tmp_path: Path):
    code, rows = run(tmp_path, "--dry", "--parts", name)
    assert code == 0
    assert rows
    assert all("figures" in row or "does not work on a cpu" in row["skip"] for row in rows), rows


def test_the_layouts_give_the_same_log_probabilities(tmp_path: Path):
    _, rows = run(tmp_path, "--dry", "--parts", "layouts")
    figures = {row["row"].rpartition(", ")[2]: row["figures"] for row in rows}
    assert float(figures["packed"]["difference"]) < 1e-5
    assert float(figures["padded"]["difference"]) < 1e-5
    tokens = {name: int(value["tokens"].replace(",", "")) for name, value in figures.items()}
    assert tokens["shared"] < tokens["packed"] < tokens["padded"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_says_so_and_nothing_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, rows = run(tmp_path)
    assert code == 0
    skipped = {row["part"] for row in rows if "no GPU" in row.get("skip", "")}
    assert skipped == set(part.PARTS) - {"machine"}
    assert capsys.readouterr().out.count("skipped: no GPU") == len(skipped)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_what_is_not_installed_is_named(tmp_path: Path):
    _, rows = run(tmp_path, "--dry", "--parts", "step flash2")
    assert rows == [{"part": "step flash2", "skip": "flash_attn is not installed"}]


def test_rows_before_a_part_was_cut_off_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hangs = 'import time; print(\'{"row": "a", "figures": {}}\', flush=True); time.sleep(60)'
    start = subprocess.Popen

    def fake(command: list[str], **options: Any) -> subprocess.Popen[str]:
        return start([sys.executable, "-c", hangs], **options)

    monkeypatch.setattr(subprocess, "Popen", fake)
    monkeypatch.setitem(program.LIMIT_S, "machine", 2.0)
    code, rows = run(tmp_path, "--parts", "machine")
    assert code == 1
    assert rows[0]["row"] == "a"
    assert "killed, after 2 s" in rows[1]["failed"]


def test_a_part_for_which_no_time_is_left_is_named(tmp_path: Path):
    _, rows = run(tmp_path, "--dry", "--parts", "nccl", "--total", "1")
    assert rows == [{"part": "nccl", "skip": "no time left"}]

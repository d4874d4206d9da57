"""What the deterministic run prints of its steps."""

import json
from pathlib import Path

from tools.same_numbers import digest, step_lines


def run_with(folder: Path, *losses: float) -> Path:
    lines = [
        json.dumps({"step": n, "loss": loss, "seconds": n * 0.1})
        for n, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_line_has_every_digit_of_the_loss(tmp_path: Path) -> None:
    assert step_lines(run_with(tmp_path, 0.1 + 0.2)) == ["   1  0.30000000000000004"]


def test_a_digest_changes_with_the_last_digit_of_any_loss(tmp_path: Path) -> None:
    lines = step_lines(run_with(tmp_path, 0.3, 0.5))
    other = step_lines(run_with(tmp_path, 0.30000000000000004, 0.5))
    assert digest(lines) == digest(list(lines))
    assert digest(lines) != digest(other)

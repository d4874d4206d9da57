"""The modules of the tasks load fast: an actor's reward processes import them."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("actors.tasks.tool_calling", {"torch", "scipy", "numpy", "transformers"}),
        ("actors.tasks.tool_calling_tiny", {"torch", "transformers", "tokenizers"}),
    ],
)
def test_a_task_imports_nothing_heavy(module: str, unwanted: set[str]) -> None:
    program = f"import sys, {module}; assert not {unwanted} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)

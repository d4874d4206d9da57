"""What the chaos suite records of the product, wrapped in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("recorder", ["record_actor", "record_learner"])
def test_everything_that_is_recorded_is_a_method_of_the_product(recorder, tmp_path):
    # In a process of its own, because it wraps them.
    script = f"""
from pathlib import Path
from tests.chaos.record import Record, {recorder}
{recorder}(Record(Path({str(tmp_path / "record")!r})))
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=50)

"""A process that is killed while it keeps completions: what is there can be read."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from learner.completions.files import CompletionFiles, read_completions

KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.learner.completions.test_files import filled, make_completion
files = filled(Path({folder!r}), range(1, 2))
print(1, flush=True)
for step in range(2, 100_000):
    files.add([make_completion(step, rollout=r) for r in range(100)])
    files.replace_newest([make_completion(step, rollout=r) for r in range(1000)])
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay_s", [0.1, 0.3, 0.7])
def test_a_killed_learner_leaves_files_that_can_be_read(tmp_path: Path, delay_s: float) -> None:
    root = str(Path(__file__).parents[2])
    program = textwrap.dedent(KILLED).format(root=root, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"1\n"
            time.sleep(delay_s)
        finally:
            process.send_signal(signal.SIGKILL)
        told = 1 + len(process.stdout.read().split())
    assert told > 1
    steps = {row.step for row in read_completions(tmp_path)}
    # The addition that it was killed in may be there already.
    assert steps in (set(range(1, told + 1)), set(range(1, told + 2)))

    again = CompletionFiles(tmp_path, max_bytes=4 << 20)
    assert again.forget_after(told) == []
    assert {row.step for row in read_completions(tmp_path)} == set(range(1, told + 1))

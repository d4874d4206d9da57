"""A process that is killed while it writes its journal: what it told of is there."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.unit.learner.replay.test_journal import limits, read

KILLED = """
import os, sys, threading
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.learner.replay.test_journal import Writer
writer = Writer(Path({path!r}), start=False)
told = 0

def on_stored(groups):
    global told
    for received in groups:
        os.write(1, b"%d\\n" % received.lease.work.prompt_index)
        told += 1
        if told >= {after}:
            os._exit(9)

writer.journal.start(on_stored, lambda error: os._exit(1))
for prompt_index in range(10_000):
    writer.append(prompt_index)
threading.Event().wait()
"""


@pytest.mark.parametrize("after", [1, 7, 60])
def test_guarantee_2_what_was_told_is_there_after_the_process_was_killed(
    tmp_path: Path, after: int
) -> None:
    path = tmp_path / "journal.sqlite"
    root = str(Path(__file__).parents[2])
    program = textwrap.dedent(KILLED).format(root=root, path=str(path), after=after)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert result.returncode == 9, result.stderr.decode()
    told = [int(line) for line in result.stdout.split()]
    assert len(told) == after
    reader = read(path)
    assert set(told) <= set(reader.prompt_indices())
    for prompt_index in told:
        assert reader.group(prompt_index, limits()).lease == prompt_index + 100
    # Nothing of a transaction that was not complete.
    prompt_indices = reader.prompt_indices()
    assert prompt_indices == tuple(range(len(prompt_indices)))

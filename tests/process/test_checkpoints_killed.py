"""A process that is killed while it writes a checkpoint: what is left is never read."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from learner.config.file import load_config
from learner.recovery.checkpoints import newest
from learner.training.policy import load_policy
from tests.unit.learner.recovery.test_checkpoints import QUICK

KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from learner.config.file import load_config
from tests.unit.learner.recovery.test_checkpoints import QUICK, Trained
trained = Trained(load_config(Path({recipe!r}), QUICK), Path({folder!r}), keep=100)
trained.step()
print("go", flush=True)
while True:
    trained.trainer.version += 1
    trained.save()
    print(trained.trainer.version, flush=True)
"""


@pytest.mark.timeout(120)
def test_guarantee_7_one_that_was_killed_while_it_was_written_is_never_read(
    tmp_path: Path, recipe: Path
) -> None:
    folder = tmp_path / "checkpoints"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = textwrap.dedent(KILLED).format(root=root, recipe=str(recipe), folder=str(folder))
    for delay_s in (0.05, 0.12, 0.3):
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"go\n"
                time.sleep(delay_s)
            finally:
                process.send_signal(signal.SIGKILL)
            written = [int(line) for line in process.stdout.read().split()]
        found = newest(folder)
        if written:
            assert found is not None
            # The one that it was killed in may be complete, but is not told of yet.
            assert found.version in (written[-1], written[-1] + 1)
        if found is not None:
            load_policy(load_config(recipe, QUICK), found.model)
        for path in list(folder.iterdir()):
            if not path.name.endswith(".partial"):
                path.rename(path.with_name(f"seen-{delay_s}-{path.name}"))
            # A leftover is for the next process to remove.

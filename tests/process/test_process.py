"""Leaving while a thread is in a call that cannot be interrupted."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# With sys.exit the wait would end while torch is being torn down, which takes longer than 0.1 s.
SCRIPT = """
import atexit, sys, threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from protocol.process import leave

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

def wait():
    store.wait(["never"], timedelta(seconds=0.3))

threading.Thread(target=wait, daemon=True).start()
time.sleep(0.2)
atexit.register(print, "at exit")
print("printed", end=", ")
leave(7)
"""


def test_leaving_keeps_exit_code_and_output():
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert process.returncode == 7, process.stderr
    assert process.stdout == "printed, at exit\n"
    assert "terminate called" not in process.stderr

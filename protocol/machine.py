"""The machine that a process is on, in the sense that matters here: whose memory it can map."""

import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def machine_id() -> str:
    """An id that differs for two processes if one cannot open the other's ``/proc/PID/fd``.

    That takes the same boot of the same kernel, the same user, and the same PID namespace, of which
    containers have one each. (A security module may forbid it nevertheless.) Empty where the kernel
    does not tell.
    """
    try:
        boot, namespace = _BOOT_ID.read_text().strip(), _PID_NAMESPACE.stat().st_ino
    except OSError:
        return ""
    return f"{boot}/{namespace}/{os.getuid()}"

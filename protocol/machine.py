"""Which machine a process is on, in the sense that matters here: whose memory it can map."""

import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def machine_id() -> str:
    """Equal for two processes exactly if one can open the other's ``/proc/PID/fd``.

    That takes the same boot of the same kernel, the same user, and one PID namespace: containers
    on one machine have several. Empty where the kernel does not tell.
    """
    try:
        boot, namespace = _BOOT_ID.read_text().strip(), _PID_NAMESPACE.stat().st_ino
    except OSError:
        return ""
    return f"{boot}/{namespace}/{os.getuid()}"

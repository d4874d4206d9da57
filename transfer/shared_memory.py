"""Memory that other processes can map, and views of it that can be taken away from their writers.

SharedMemory.tensor ──► pages ◄── DetachableView.tensor ◄── a broadcast writes
                               ╳ detach: from now on it writes to pages that nobody reads
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch

from protocol.errors import EngineError

_FOR_ALL_DEVICES = 1
"""CUDA's cudaHostRegisterPortable."""
_MAP_FIXED = 16
_MADV_POPULATE_WRITE = 23
"""Since Linux 5.14."""
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class SharedMemory:
    """Pages without a name in any file system.

    Nothing is left of them however the process ends, and the small /dev/shm of a container is no
    limit.
    """

    def __init__(self, num_bytes: int, *, pinned: bool = False) -> None:
        """``pinned`` memory is what a GPU copies from and to at full speed; it needs CUDA.

        Raises OSError if this machine never has that much.
        """
        # A memfd promises any size, and the process would end where the pages run out.
        mmap.mmap(-1, max(num_bytes, 1)).close()
        self.descriptor = os.memfd_create("gdpo-weights")
        when_gone(self, os.close, self.descriptor)
        os.truncate(self.descriptor, num_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        """File by which processes of this user map the same pages, while this object lives."""
        self.tensor = torch.from_file(self.path, shared=True, size=num_bytes, dtype=torch.uint8)
        """uint8 [num_bytes]; it keeps the pages even when this object is gone."""
        if pinned:
            self._pin()

    def _pin(self) -> None:
        address, runtime = self.tensor.data_ptr(), torch.cuda.cudart()
        error = runtime.cudaHostRegister(address, self.tensor.nbytes, _FOR_ALL_DEVICES)
        torch.cuda.check_error(int(error))
        when_gone(self, runtime.cudaHostUnregister, address)


class DetachableView:
    """A view of shared memory for a writer that cannot be stopped."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self.tensor = torch.from_file(
            memory.path, shared=True, size=len(memory.tensor), dtype=torch.uint8
        )
        """uint8 [num_bytes]; it stays mapped while anything refers to it, or to a part of it."""

    def detach(self, offset: int, num_bytes: int) -> None:
        """Keep what is written here from now on out of the shared memory.

        What was there can still be read: the writer may be passing it on. ``offset`` is a multiple
        of the page size; raises `EngineError` if the system refuses.
        """
        address = self.tensor.data_ptr() + offset
        assert address % mmap.PAGESIZE == 0
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        # In one step the same pages, to be copied before they are written to: no write is lost, not
        # even one that the kernel is in the middle of.
        private = mmap.MAP_PRIVATE | _MAP_FIXED
        mapped = _libc.mmap(address, num_bytes, writable, private, self._memory.descriptor, offset)
        if mapped == _FAILED:
            problem = os.strerror(ctypes.get_errno())
            raise EngineError(f"memory cannot be taken from a broadcast: {problem}")
        # This copies all pages now. An older kernel copies each when it is written: until then,
        # whoever is sent them may get what others have written, and its digests tell.
        _libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE)


def when_gone(thing: object, call: Callable[..., Any], *arguments: Any) -> None:
    """Make the call once ``thing`` is gone, but not when the process ends: threads may use it."""
    weakref.finalize(thing, call, *arguments).atexit = False

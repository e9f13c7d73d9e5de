"""Memory of this process as its system tells it."""

import ctypes
import gc
import platform
import sys
from contextlib import suppress
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Gives back what is free and lets the peak start anew from what is in use; on Linux only."""
    gc.collect()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        _RESET.write_text("5")


def used_mib() -> float | None:
    """What is in use now, in MiB; None where the system does not tell."""
    return _status("VmRSS")


def peak_mib() -> float | None:
    """The most that was in use since `forget_peak`, or where that cannot be, since the start; in MiB."""
    found = _status("VmHWM")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _status(name: str) -> float | None:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return float(line.split()[1]) / 1024
    return None

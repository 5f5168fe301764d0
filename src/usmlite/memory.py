"""How much memory this process takes, and giving back what it does not need."""

from __future__ import annotations

import ctypes
import os
import sys


class PeakMemory:
    """The highest resident memory of this process, from now on where the system can tell."""

    def __init__(self) -> None:
        self._from_now = False
        try:
            # Linux: 5 sets the high-water mark of this process back to what it holds now.
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self._from_now = True
        except OSError:
            pass

    def read(self) -> tuple[int, str]:
        """Returns bytes, and how they were measured."""
        try:
            with open("/proc/self/status") as file:
                kibibytes = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            return self._elsewhere()
        since = "during the evaluation" if self._from_now else "since the process started"
        return kibibytes * 1024, f"peak resident memory {since} (VmHWM of /proc/self/status)"

    def _elsewhere(self) -> tuple[int, str]:
        try:
            import resource
        except ImportError:
            import psutil  # type: ignore[import-untyped]  # accelerate brings it, without types

            info = psutil.Process().memory_info()
            peak = int(getattr(info, "peak_wset", info.rss))
            return peak, "peak working set since the process started (psutil)"
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return int(peak), "peak resident memory since the process started (getrusage)"


def resident_memory() -> int:
    """Bytes of this process in memory now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)


def return_freed_memory() -> None:
    """Gives memory that was freed back to the system, where the C library keeps it (glibc)."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no CDLL(None)
        return
    trim(ctypes.c_size_t(0))

import platform

import pytest

from usmlite.memory import PeakMemory, resident_memory, return_freed_memory


def test_a_peak_is_seen_after_it_is_gone():
    memory = PeakMemory()
    before, how = memory.read()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    after, _ = memory.read()
    assert after - before > 48 << 20
    assert "resident" in how or "working set" in how


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_freed_memory_goes_back() -> None:
    blocks = [bytearray(b"x" * 100_000) for _ in range(500)]  # too small to be mapped one by one
    full = resident_memory()
    last = blocks[-1]  # above all the others, so that they are not given back when they are freed
    blocks.clear()
    return_freed_memory()
    assert full - resident_memory() > 30 << 20
    assert len(last) == 100_000

from usmlite.memory import PeakMemory


def test_a_peak_is_seen_after_it_is_gone():
    memory = PeakMemory()
    before, how = memory.read()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    after, _ = memory.read()
    assert after - before > 48 << 20
    assert "resident" in how or "working set" in how

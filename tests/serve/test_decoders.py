"""The processes that decode audio: whatever happens to one, the next file is decoded."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from serve.serving import coded, hum
from usmlite.serve import decoders, decoding
from usmlite.serve.decoders import Decoders
from usmlite.serve.errors import ApiError
from usmlite.serve.limits import Limits

LIMITS = Limits(audio_seconds=5.0, decode_seconds=20.0)
SOUND = coded(hum(1.0))


def run(test: Callable[[Decoders], Awaitable[None]], limits: Limits = LIMITS, count: int = 1) -> Decoders:
    async def whole() -> Decoders:
        found = Decoders(limits, count)
        await found.start()
        try:
            await test(found)
        finally:
            await found.stop()
        return found

    return asyncio.run(whole())


async def refused(found: Decoders, file: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await found.decode(file)
    return caught.value


def test_one_file_after_the_other() -> None:
    async def test(found: Decoders) -> None:
        for _ in range(3):
            samples = await found.decode(SOUND)
            assert samples.dtype == np.float32
            np.testing.assert_allclose(samples, hum(1.0), atol=1e-4)
            assert (await refused(found, b"nothing of the kind")).status == 415
            assert (await refused(found, coded(hum(5.5)))).status == 413
        both = await asyncio.gather(found.decode(SOUND), found.decode(coded(hum(2.0))))
        assert [len(each) for each in both] == [16_000, 32_000]

    assert run(test).broken == 0


def test_one_that_was_killed_is_replaced() -> None:
    async def test(found: Decoders) -> None:
        (process,) = found._all
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        assert len(await found.decode(SOUND)) == 16_000
        # A stop of the whole group is the server's business.
        (process,) = (each for each in found._all if each.returncode is None)
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        assert len(await found.decode(SOUND)) == 16_000

    run(test)


BROKEN = {
    "dies": "import os; os.abort()",
    "hangs": "import time; time.sleep(60)",
    "raves": "import sys; sys.stdout.write('x' * 1000); sys.stdout.flush(); sys.stdin.read()",
    "promises too much": "import sys; sys.stdout.buffer.write(b'S' + b'\\xff' * 8); sys.stdout.flush(); "
    "sys.stdin.read()",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_breaks_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_START", f"import sys; sys.stdin.buffer.read(100); {BROKEN[kind]}")
    limits = Limits(audio_seconds=5.0, decode_seconds=1.0 if kind == "hangs" else 20.0)

    async def patient(found: Decoders) -> None:
        # The real process that follows may need longer to start than the one that hangs is waited for.
        monkeypatch.setattr(found, "_limits", limits)
        monkeypatch.setattr(decoders, "_START", "from usmlite.serve.decoding import main; main()")
        assert (await refused(found, SOUND)).code == "decoding_failed"
        monkeypatch.setattr(found, "_limits", LIMITS)
        assert len(await found.decode(SOUND)) == 16_000

    assert run(patient, limits).broken == 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded where the system can")
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(found: Decoders) -> None:
        assert (await refused(found, coded(hum(600.0)[::2], "WAV", "DOUBLE"))).code in (
            "invalid_audio", "decoding_failed",
        )  # fmt: skip
        assert len(await found.decode(SOUND)) == 16_000

    # The file has 38 MB, its samples 19.
    monkeypatch.setattr(decoders, "memory_bytes", lambda *_: 24 * 2**20)
    run(test, Limits(audio_seconds=1_000.0))


def test_it_loads_no_model() -> None:
    code = (
        "import sys, usmlite.serve.decoding; "
        "sys.exit(bool({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    )

    async def outcome() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        return await process.wait()

    assert asyncio.run(outcome()) == 0


def test_errors_name_no_place() -> None:
    kind, said = decoding.decode(SOUND[:30], 5.0)
    assert kind == decoding.UNKNOWN_FORMAT
    assert b"/" not in said
    assert b"BytesIO" not in said

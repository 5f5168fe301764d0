from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from usmlite.errors import AudioError
from usmlite.microphone import Microphone


class FakeError(Exception):
    pass


class Stream:
    """What PortAudio would do: hands over blocks, here all at once."""

    def __init__(self, *, samplerate: int, blocksize: int, callback: Callable[..., None], **_: Any) -> None:
        self.rate, self.size, self.callback = samplerate, blocksize, callback

    def __enter__(self) -> Stream:
        tone = np.sin(2 * np.pi * 440 * np.arange(self.rate) / self.rate).astype(np.float32)
        for low in range(0, len(tone), self.size):
            block = tone[low : low + self.size, None]
            self.callback(block, len(block), None, None)
            block[:] = np.nan  # PortAudio uses the memory again
        return self

    def __exit__(self, *_: object) -> None:
        pass


def sounddevice(*, rates: tuple[int, ...] = (16_000, 48_000), missing: bool = False) -> SimpleNamespace:
    def check(*, device: object, samplerate: int, **_: object) -> None:
        if missing or samplerate not in rates:
            raise FakeError("Invalid sample rate")

    def query(device: object, kind: str) -> dict[str, float]:
        if missing:
            raise ValueError(f"No input device matching {device!r}")
        return {"default_samplerate": float(rates[-1])}

    return SimpleNamespace(
        PortAudioError=FakeError, InputStream=Stream, check_input_settings=check, query_devices=query
    )


@pytest.mark.parametrize("rates", [(16_000,), (48_000,)])
def test_a_second_comes_out_at_16_khz(rates: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", sounddevice(rates=rates))
    microphone = Microphone()
    heard = []
    for chunk in microphone:
        heard.append(chunk)
        microphone.stop()
    samples = np.concatenate(heard)
    assert samples.dtype == np.float32
    assert len(samples) == pytest.approx(16_000, abs=600)
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() == pytest.approx(1.0, abs=0.05)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", sounddevice(missing=True))
    with pytest.raises(AudioError, match=r"microphone desk: .*No input device.*--mic-device"):
        Microphone("desk")
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(AudioError, match=r'pip install "usmlite\[mic\]"'):
        Microphone()

"""Reading audio, and Whisper's log-mel features.

Everything downstream hears the same thing: mono float32 samples at 16 kHz, in -1 to 1.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
import soundfile
import soxr

from usmlite import shards
from usmlite.errors import AudioError, AudioFormatError, AudioTooLongError

if TYPE_CHECKING:
    import torch

# torch is imported by the functions that compute with it: who only reads audio, as the server's decoding
# process does, starts in a moment and stays small.

Source: TypeAlias = str | PathLike[str] | BinaryIO
"""A path, also into a tar file (`usmlite.shards`), or an open file (or `io.BytesIO`) that can be sought."""

SAMPLE_RATE = 16_000
WINDOW_SECONDS = 30.0
WINDOW_SAMPLES = 480_000
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
"""File name endings that a folder of audio is searched for."""

MIN_SECONDS = 0.1
SILENCE = 1e-4
"""Peak at or below which audio counts as silent: -80 dBFS, three steps of 16-bit audio."""
LOUDEST = 16.0
"""Peak above which samples cannot be on the -1 to 1 scale, even clipped or resampled ones."""

_FFT = 400  # samples in one analysis frame: 25 ms
_HOP = 160  # samples between frames: 10 ms
_BLOCK = 2**20  # samples, over all channels, decoded at a time
_RATES = (1_000, 768_000)  # Hz; outside it the header is damaged


def load_audio(
    source: Source,
    *,
    start: float = 0.0,
    seconds: float | None = None,
    max_seconds: float | None = None,
    speed: float = 1.0,
) -> np.ndarray:
    """Reads an audio file as mono 16 kHz samples.

    Any format that libsndfile knows (WAV, FLAC, OGG Vorbis, Opus, MP3, ...) and any sample rate;
    channels are averaged. The file is decoded and resampled block by block, so that memory follows the
    audio that is really there and not the length that a header claims.

    Args:
        source: the audio file.
        start: where to begin, in seconds.
        seconds: how much to read; None for all that follows. A part that was asked for by `start` or
            `seconds` may be silent, a whole file may not.
        max_seconds: refuse a file longer than this (the whole file, whatever part is read).
        speed: play it this many times as fast, with the pitch that goes with it; all other arguments
            speak of the file.

    Returns:
        float32 `[samples]`, in -1 to 1.

    Raises:
        AudioError: the file is missing, unreadable, not audio, empty, cut short, silent, shorter than
            0.1 s, longer than `max_seconds`, or holds NaN or infinity.
    """
    if start < 0 or (seconds is not None and seconds <= 0) or not 0.25 <= speed <= 4.0:
        raise ValueError(
            f"start must be >= 0, seconds > 0 and speed 0.25 to 4, got {start=}, {seconds=}, {speed=}"
        )
    where = _name(source)
    with _opened(source) as sound:
        rate = sound.samplerate
        if max_seconds is not None and sound.frames > max_seconds * rate:
            raise AudioTooLongError(
                "the audio is too long",
                where=where,
                expected=f"at most {max_seconds:g} s",
                found=f"{sound.frames / rate:.1f} s",
                remedy="Cut it into shorter pieces.",
            )
        first = round(start * rate)
        wanted = None if seconds is None else max(1, round(seconds * rate))
        if first:
            if first >= sound.frames:
                raise AudioError(
                    "the audio ends before the part that was asked for",
                    where=where,
                    expected=f"more than {start:g} s",
                    found=f"{sound.frames / rate:.2f} s",
                )
            with _decoding(where):
                sound.seek(first)
        resampler = None
        if rate * speed != SAMPLE_RATE:
            resampler = soxr.ResampleStream(rate * speed, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        pieces = []
        read = 0
        for block in _blocks(where, sound, wanted):
            read += len(block)
            pieces.append(block if resampler is None else resampler.resample_chunk(block))
        if resampler is not None:
            pieces.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        _check_complete(where, sound, first, wanted, read)
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    _check(samples, where, silence=first == 0 and wanted is None)
    return samples


def audio_seconds(source: Source) -> float:
    """Returns the length of an audio file in seconds, from its header.

    Raises:
        AudioError: the file is missing, unreadable, not audio, or its header gives no length.
    """
    with _opened(source) as sound:
        if not sound.frames:
            raise _empty(_name(source))
        return float(sound.frames / sound.samplerate)


def check_samples(samples: np.ndarray, where: str | PathLike[str]) -> None:
    """Applies the checks of `load_audio` to an array.

    Args:
        samples: float `[samples]`, mono, 16 kHz, in -1 to 1.
        where: what to call it in an error.

    Raises:
        AudioError: it is not one-dimensional floating point, or empty, silent, shorter than 0.1 s,
            holds NaN or infinity, or is not on the -1 to 1 scale.
    """
    _check(samples, where, silence=True)


def log_mel(samples: torch.Tensor, n_mels: int = 80, *, causal: bool = False) -> torch.Tensor:
    """Computes Whisper's log-mel spectrogram.

    The same numbers as `transformers.WhisperFeatureExtractor` and openai/whisper `audio.py`: 25 ms
    Hann frames every 10 ms, power, Slaney mel filters, log10, clipped to 8 below the loudest value of
    each item, then (x + 4) / 4. Runs on the samples' device, always in float32.

    Args:
        samples: `[batch, samples]`, 16 kHz, zero-padded to 30 s (480,000 samples) for Whisper.
        n_mels: 80, or 128 for large-v3.
        causal: the loudest value is that of the item so far, so that no frame waits for the end.

    Returns:
        float32 `[batch, n_mels, samples // 160]`.
    """
    if samples.ndim != 2 or samples.shape[1] <= _FFT // 2:
        raise ValueError(f"samples must be [batch, more than {_FFT // 2}], got {list(samples.shape)}")
    import torch

    # Autocast would run the filter product in bfloat16: three digits are too few for a logarithm.
    with torch.autocast(samples.device.type, enabled=False):
        window, filters = _window_and_filters(n_mels, samples.device)
        spectrum = torch.stft(samples.float(), _FFT, _HOP, window=window, return_complex=True)
        power = torch.view_as_real(spectrum)[:, :, : samples.shape[1] // _HOP].square().sum(-1)
        mel = (filters @ power).clamp(min=1e-10).log10()
        loudest = mel.amax(dim=1, keepdim=True)
        loudest = loudest.cummax(dim=2).values if causal else loudest.amax(dim=2, keepdim=True)
        floor = loudest - 8.0
        return torch.maximum(mel, floor).add(4.0).div(4.0)


@lru_cache(maxsize=8)
def _window_and_filters(n_mels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    # Outside inference mode, for what is cached may meet autograd later.
    with torch.inference_mode(False):
        filters = torch.from_numpy(_slaney_filters(n_mels)).to(device)
        return torch.hann_window(_FFT, device=device), filters


def _slaney_filters(n_mels: int) -> np.ndarray:
    """Triangular mel filters of equal area, float32 `[n_mels, 201]`.

    The scale of Slaney's Auditory Toolbox (1998), librosa's default: linear to 1 kHz (15 mels), above it
    27 mels for every factor of 6.4.
    """
    log_step = math.log(6.4) / 27.0
    top = 15.0 + math.log(SAMPLE_RATE / 2 / 1000.0) / log_step
    mels = np.linspace(0.0, top, n_mels + 2)
    edges = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp(log_step * (mels - 15.0)))  # Hz
    bins = np.linspace(0.0, SAMPLE_RATE / 2, _FFT // 2 + 1)  # Hz
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles: np.ndarray = np.maximum(0.0, np.minimum(rising, falling))
    triangles *= 2.0 / (edges[2:] - edges[:-2])[:, None]
    return triangles.astype(np.float32)


def _name(source: Source) -> str | PathLike[str]:
    """What errors call it."""
    return source if isinstance(source, (str, PathLike)) else "audio"


def _check_file(path: str | PathLike[str]) -> None:
    if not os.path.exists(path):
        raise AudioError("no such audio file", where=path)
    if not os.path.isfile(path):
        raise AudioError("not a file", where=path, expected="an audio file")
    if not os.access(path, os.R_OK):
        raise AudioError("no permission to read the file", where=path)
    if os.path.getsize(path) == 0:
        raise AudioError("the file is empty", where=path, expected="an audio file", found="0 bytes")


def _opened(source: Source) -> soundfile.SoundFile:
    where = _name(source)
    if isinstance(source, (str, PathLike)) and shards.shard_of(source) is not None:
        source = _in_shard(source)
    elif isinstance(source, (str, PathLike)):
        _check_file(source)
    try:
        sound = soundfile.SoundFile(os.fspath(source) if isinstance(source, (str, PathLike)) else source)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise AudioFormatError(
            "cannot be read as audio",
            where=where,
            expected="WAV, FLAC, OGG, Opus or MP3",
            found=_reason(error),
            remedy="Convert it, for example with: ffmpeg -i INPUT -ar 16000 -ac 1 OUTPUT.flac",
        ) from error
    if not _RATES[0] <= sound.samplerate <= _RATES[1]:
        sound.close()
        raise AudioError(
            "the sample rate makes no sense",
            where=where,
            expected=f"{_RATES[0]} to {_RATES[1]} Hz",
            found=f"{sound.samplerate} Hz",
        )
    if sound.frames >= 2**62:  # libsndfile's word for "unknown"; it cannot read such a file to its end
        sound.close()
        raise AudioError(
            "the header gives no length",
            where=where,
            remedy="Such files come from encoders that wrote to a pipe; convert it again.",
        )
    return sound


def _in_shard(path: str | PathLike[str]) -> BinaryIO:
    try:
        return io.BytesIO(shards.read_member(path))
    except OSError as error:
        raise AudioError("cannot be read from its shard", where=path, found=error) from error


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", error))
    return text.strip().rstrip(".").removeprefix("Error : ")


@contextlib.contextmanager
def _decoding(path: str | PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise AudioError(
            "the audio is damaged",
            where=path,
            found=_reason(error),
            remedy="Copy or convert the file again.",
        ) from error


def _blocks(path: str | PathLike[str], sound: soundfile.SoundFile, limit: int | None) -> Iterator[np.ndarray]:
    size = max(1, _BLOCK // sound.channels)
    left = limit
    while left is None or left > 0:
        frames = size if left is None else min(size, left)
        with _decoding(path):
            block: np.ndarray = sound.read(frames, dtype="float32", always_2d=True)
        if len(block):
            yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        if len(block) < frames:
            return
        if left is not None:
            left -= len(block)


def _check_complete(
    path: str | PathLike[str], sound: soundfile.SoundFile, first: int, wanted: int | None, read: int
) -> None:
    claimed = sound.frames - first
    expected = claimed if wanted is None else min(claimed, wanted)
    missing = expected - read
    # Lossy formats pad their ends, hence the tolerance: the one that a manifest's durations have.
    if missing > MIN_SECONDS * sound.samplerate and missing > 0.02 * expected:
        raise AudioError(
            "the audio ends early",
            where=path,
            expected=f"{expected / sound.samplerate:.2f} s by its header",
            found=f"{read / sound.samplerate:.2f} s",
            remedy="The file is cut short; copy or convert it again.",
        )


def _check(samples: np.ndarray, where: str | PathLike[str], *, silence: bool) -> None:
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise AudioError(
            "not an array of mono samples",
            where=where,
            expected="floating point [samples] in -1 to 1",
            found=f"{samples.dtype} {list(samples.shape)}",
            remedy="Average the channels; divide 16-bit integers by 32768.",
        )
    if len(samples) == 0:
        raise _empty(where)
    if len(samples) < round(MIN_SECONDS * SAMPLE_RATE):
        raise AudioError(
            "the audio is too short",
            where=where,
            expected=f"at least {MIN_SECONDS} s",
            found=f"{len(samples) / SAMPLE_RATE:.3f} s",
        )
    low, high = float(samples.min()), float(samples.max())  # NaN if any sample is
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int(np.argmin(np.isfinite(samples)))
        raise AudioError(
            "the audio holds values that are not numbers",
            where=where,
            expected="finite samples",
            found=f"{samples[bad]} at {bad / SAMPLE_RATE:.3f} s",
            remedy="Export the audio again, as 16-bit for example.",
        )
    peak = max(-low, high)
    if peak > LOUDEST:
        raise AudioError(
            "the samples are not on the -1 to 1 scale",
            where=where,
            expected="a peak near 1",
            found=f"{peak:g}",
            remedy="Divide 16-bit samples by 32768.",
        )
    if silence and peak <= SILENCE:
        raise AudioError(
            "the audio is silent",
            where=where,
            expected="speech",
            found=f"a peak of {peak:.1e}",
            remedy="Check the recording; its channels may also cancel each other.",
        )


def _empty(where: str | PathLike[str]) -> AudioError:
    return AudioError("the audio is empty", where=where, expected="speech", found="0 samples")

"""Changes of what the student trains on: noise and holes in the speech, wrong words in the text before.

Changes of speed are made where audio is read (`audio.load_audio`): they change how much fits a window.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_LONGEST_ECHO = 256  # samples of the impulse response that colors noise


def add_noise(samples: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Adds noise of a random color, from white to the rumble of rooms and fans.

    Args:
        samples: float `[samples]`; not changed.
        snr_db: power of the samples over that of the noise, in dB.
        rng: draws color and noise.

    Returns:
        float64 `[samples]`.
    """
    white = rng.standard_normal(len(samples))
    # Between white noise and its running sum.
    noise = _low_pass(white, rng.uniform(0.0, 0.95))
    power, noise_power = float(np.mean(np.square(samples, dtype=np.float64))), float(np.mean(noise**2))
    noisy: np.ndarray = samples + noise * np.sqrt(power / noise_power / 10 ** (snr_db / 10))
    return noisy


def _low_pass(white: np.ndarray, color: float) -> np.ndarray:
    """y[t] = color * y[t - 1] + white[t], by its impulse response."""
    response = color ** np.arange(float(_LONGEST_ECHO))
    size = len(white) + len(response)
    product = np.fft.rfft(white, size) * np.fft.rfft(response, size)
    out: np.ndarray = np.fft.irfft(product, size)[: len(white)]
    return out


def spec_augment(features: Tensor, generator: torch.Generator, channel_axis: int | None = 1) -> Tensor:
    """Silences two bands of frequency and five stretches of time (SpecAugment, arXiv 1904.08779).

    Args:
        features: float `[batch, mels, frames]` or `[batch, frames, mels]`, or samples `[batch, samples]`, of
            which bands of the whole window's spectrum are silenced; not changed.
        generator: on the CPU.
        channel_axis: where the mel bins are; None for samples.

    Returns:
        A masked copy; masked places have the window's mean.
    """
    if channel_axis is None:
        spectrum = torch.view_as_real(torch.fft.rfft(features.float()))
        bands = _masked(spectrum, generator, ((0, 2, spectrum.shape[1] // 6),), fill=0.0)
        samples = torch.fft.irfft(torch.view_as_complex(bands), features.shape[1]).to(features.dtype)
        return _masked(samples, generator, ((0, 5, features.shape[1] // 40),))
    mels, frames = features.shape[channel_axis], features.shape[3 - channel_axis]
    axes = ((channel_axis - 1, 2, mels // 6), (2 - channel_axis, 5, frames // 40))
    return _masked(features, generator, axes)


def _masked(
    values: Tensor,
    generator: torch.Generator,
    axes: Iterable[tuple[int, int, int]],
    fill: float | None = None,
) -> Tensor:
    """A copy with stretches of each row silenced: axis, how many, the widest; None fills with the mean."""
    out = values.clone()
    for row, original in zip(out, values, strict=True):
        silence = original.mean() if fill is None else torch.tensor(fill, device=values.device)
        for axis, count, widest in axes:
            for _ in range(count):
                width = int(torch.randint(0, widest + 1, (), generator=generator))
                start = int(torch.randint(0, row.shape[axis] - width + 1, (), generator=generator))
                row.narrow(axis, start, width).copy_(silence)
    return out


def swap_words(tokens: Tensor, words: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Puts other words of the batch in the place of some, in what the decoder is told that it said so far.

    What a small corpus says is learned by heart long before what its speech sounds like. Out of place words
    make every pass over it new to the decoder, and the teacher's answer to them is as good as to any other.

    Args:
        tokens: int64 `[batch, tokens]`, the decoder's inputs; not changed.
        words: bool `[batch, tokens]`, the inputs that are words (no prompt, time or padding).
        share: of the words, how many are replaced.
        generator: on the CPU.

    Returns:
        A copy with words replaced.
    """
    swapped = words & (torch.rand(tokens.shape, generator=generator) < share)
    pool = tokens[words]
    out = tokens.clone()
    if len(pool):
        out[swapped] = pool[torch.randint(len(pool), (int(swapped.sum()),), generator=generator)]
    return out

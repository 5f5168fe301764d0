"""The 30-second windows that training reads, packed from utterances."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from usmlite.audio import MIN_SECONDS, SAMPLE_RATE, WINDOW_SAMPLES, WINDOW_SECONDS, load_audio
from usmlite.data import Utterance, usable_for_training
from usmlite.errors import DataError

_OPEN_WINDOWS = 64


@dataclass(frozen=True)
class Window:
    """Utterances that share one 30-second window.

    Attributes:
        utterances: in order of time.
        starts: where each begins, in seconds within the window.
    """

    utterances: tuple[Utterance, ...]
    starts: tuple[float, ...]


def pack_windows(
    utterances: Sequence[Utterance],
    *,
    seed: int,
    epoch: int,
    single_fraction: float = 0.1,
    max_gap: float = 0.5,
) -> list[Window]:
    """Packs utterances into 30-second windows, each utterance once, in a random order.

    First fit over a shuffled list, so that hardly any of a training step is spent on padding. Some
    windows hold one utterance only: the student also has to hear short audio followed by padding, as at
    test time. The result depends on the arguments alone, on every machine.

    Args:
        utterances: none longer than 30 s (`usable_for_training` sorts those out).
        seed: the run's seed.
        epoch: packs differently in each epoch.
        single_fraction: share of the windows, about, that hold one utterance taken at random. (A long
            utterance that nothing fits beside has its window to itself as well.)
        max_gap: longest silence put between two utterances, in seconds; 0 to `max_gap`, as fits.

    Returns:
        The windows, in random order.

    Raises:
        DataError: there is no utterance, or some are too long.
    """
    if not 0.0 <= single_fraction <= 1.0 or max_gap < 0.0:
        raise ValueError(f"single_fraction must be 0 to 1 and max_gap >= 0: {single_fraction}, {max_gap}")
    if not utterances:
        raise DataError("there is no utterance to train on", where="corpus")
    _, too_long = usable_for_training(utterances)
    if too_long:
        named = ", ".join(f"{u.id} ({u.duration:.1f} s)" for u in too_long[:5])
        more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        raise DataError(
            "utterances are too long for a training window",
            where=named + more,
            expected=f"at most {WINDOW_SECONDS:g} s",
            remedy="Cut them at pauses into shorter files, or leave them out.",
        )
    # Seeded by a string: Python promises the same shuffle for it on every version and platform.
    rng = random.Random(f"{seed}/{epoch}")
    order = list(utterances)
    rng.shuffle(order)
    # With s singles among n utterances and p = windows per utterance when packed, there are
    # s + (n - s) p windows; s is the share `single_fraction` of them.
    per_utterance = len(_first_fit(order, max_gap, random.Random(0))) / len(order)
    share = single_fraction
    singles = round(share * per_utterance * len(order) / (1.0 - share + share * per_utterance))
    windows = [Window((utterance,), (0.0,)) for utterance in order[:singles]]
    windows += _first_fit(order[singles:], max_gap, rng)
    rng.shuffle(windows)
    return windows


def by_length(windows: Sequence[Window], batch: int, *, first: int, seed: str) -> list[Window]:
    """Orders windows so that those of a batch are of like length, and hardly any of it is padding.

    Args:
        windows: of one epoch.
        batch: windows of a batch.
        first: windows of the epochs before, of which the last batch may be begun.
        seed: the batches come in an order drawn from it.

    Returns:
        The same windows.
    """
    begun = -first % batch
    ordered = list(windows[:begun])
    rest = sorted(windows[begun:], key=lambda w: w.starts[-1] + w.utterances[-1].duration)
    batches = [rest[low : low + batch] for low in range(0, len(rest), batch)]
    # One that is not full goes last, else all that follow would be cut elsewhere.
    last = [batches.pop()] if batches and len(batches[-1]) < batch else []
    random.Random(seed).shuffle(batches)
    return ordered + [window for one in (*batches, *last) for window in one]


def _first_fit(order: Sequence[Utterance], max_gap: float, rng: random.Random) -> list[Window]:
    windows: list[tuple[list[Utterance], list[float]]] = []
    unfilled: list[int] = []  # indices into windows, oldest first
    ends: list[float] = []
    for utterance in order:
        gap = rng.uniform(0.0, max_gap)
        for index in unfilled:
            room = WINDOW_SECONDS - ends[index] - utterance.duration
            if room >= 0.0:
                start = ends[index] + min(gap, room)
                break
        else:
            index, start = len(windows), 0.0
            windows.append(([], []))
            ends.append(0.0)
            unfilled.append(index)
            # A large corpus would otherwise search through thousands of nearly full windows.
            if len(unfilled) > _OPEN_WINDOWS:
                unfilled.remove(max(unfilled[:-1], key=lambda i: ends[i]))
        windows[index][0].append(utterance)
        windows[index][1].append(start)
        ends[index] = start + utterance.duration
    return [Window(tuple(held), tuple(starts)) for held, starts in windows]


def load_window(window: Window) -> np.ndarray:
    """Reads a window's audio.

    Returns:
        float32 `[480000]`: 30 s at 16 kHz, silence between and after the utterances.

    Raises:
        AudioError: an utterance's audio cannot be used.
        DataError: an utterance is longer than its duration says, and so runs into the next.
    """
    samples = np.zeros(WINDOW_SAMPLES, np.float32)
    firsts = [round(start * SAMPLE_RATE) for start in window.starts]
    for utterance, first, end in zip(window.utterances, firsts, [*firsts[1:], WINDOW_SAMPLES], strict=True):
        longest = (WINDOW_SECONDS + 1.0) * utterance.speed
        audio = load_audio(utterance.audio, max_seconds=longest, speed=utterance.speed)
        excess = first + len(audio) - end
        if excess > MIN_SECONDS * SAMPLE_RATE:
            raise DataError(
                "the audio is longer than its utterance's duration",
                where=utterance.audio,
                expected=f"{utterance.duration:.2f} s",
                found=f"{len(audio) / SAMPLE_RATE:.2f} s",
                remedy="Correct the manifest's duration, or load the corpus with check_files=True.",
            )
        samples[first : min(first + len(audio), end)] = audio[: end - first]
    return samples

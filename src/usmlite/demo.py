"""The demo: the whole flow on speech that is made on the spot, in minutes and without any file.

The speech is synthetic: sentences of our own, read by the one voice of the package hibari-tts at several
speeds, levels and noises. It shows that every part works together; how good a compressed model is, only
real speech can tell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import Progress

from usmlite.atomic import write_json
from usmlite.augment import add_noise
from usmlite.compress import compress
from usmlite.data import Utterance, load_corpus, write_manifest
from usmlite.errors import ModelError, OutputError
from usmlite.load import PACKED_FOLDER, load
from usmlite.recipe import Recipe, build_recipe
from usmlite.sentences import split_sentences
from usmlite.tables import readable_bytes

VOICE_RATE = 24_000  # Hz, what hibari-tts synthesizes
COUNTS = {"train": 480, "dev": 24, "test": 72}
SPEEDS = (0.85, 0.95, 1.0, 1.1, 1.2)
SNR_DB = (15.0, 40.0)
LEVEL_DB = (-18.0, 0.0)
_DONE_FILE, _VERSION = "speech.json", 2

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"source": "tiny.en"},
    "spec": {"bits": 4, "sparsity": "2:4"},
    "student": {"calibration": 12},
    "training": {
        "steps": 100, "batch_size": 2, "learning_rate": 1e-4, "eval_every": 50, "eval_utterances": 24,
        "checkpoint_every": 25,
    },
}  # fmt: skip


class Voice(Protocol):
    """What speaks: `hibari.Hibari` is one."""

    def __call__(self, text: str, speed: float = ..., seed: int | None = ...) -> np.ndarray:
        """Text to float32 samples at `VOICE_RATE`."""


@dataclass(frozen=True)
class DemoSpeech:
    """The manifests of the synthetic speech."""

    train: Path
    dev: Path
    test: Path


def run_demo(output: Path, *, console: Console | None = None, steps: int | None = None) -> dict[str, Any]:
    """Makes speech, compresses `tiny.en` on it, and transcribes with the result.

    Args:
        output: a new directory, or one of an earlier demo, which is then taken up where it stopped.
        console: where it tells what happens; None for nowhere.
        steps: optimizer steps, instead of the demo's own.

    Returns:
        The run's report, see `compress`.

    Raises:
        ModelError: hibari-tts is not installed.
        OutputError: the directory is not ours or cannot be written.
        KeyboardInterrupt: Ctrl-C; the same call goes on from there.
    """
    console = console or Console(quiet=True)
    started = time.perf_counter()
    console.print(
        "This demo trains and tests on synthetic speech: a few hundred sentences of our own, read by one "
        "computer voice.\nIts word error rates show that the flow works, not how good a model is.\n"
    )
    speech = make_speech(output, console)
    recipe = demo_recipe(speech, steps)
    report = compress(recipe, output / "run", console=console)
    packed = output / "run" / PACKED_FOLDER
    console.print(f"\nThe packed model is in {packed}:", markup=False)
    for file in sorted(packed.iterdir()):
        console.print(f"  {readable_bytes(file.stat().st_size):>10}  {file.name}", markup=False)
    example = load_corpus(speech.test)[0]
    heard = load(packed).transcribe(example.audio).text
    console.print(f"\nIt was told   {example.text}\nand it heard  {heard}", markup=False)
    # Not wrapped: its commands are there to be copied.
    words = closing_words(report, packed, example, time.perf_counter() - started)
    console.print(words, markup=False, soft_wrap=True)
    return report


def closing_words(report: dict[str, Any], packed: Path, example: Utterance, seconds: float) -> str:
    """What the demo's figures mean and what they do not."""
    scores = report["evaluations"]
    before, after = readable_bytes(report["float32_bytes"]), readable_bytes(report["packed_bytes"])
    dense, small = 100 * scores["dense"]["wer"], 100 * scores["packed"]["wer"]
    test = example.audio.parent.parent / "test.jsonl"
    return f"""
{before} in float32 became {after} ({100 * report["size"]:.1f} %) in {seconds / 60:.1f} minutes.
Word error rate on held-out synthetic sentences: {dense:.1f} % before, {small:.1f} % after.

The layers are int4 with 2:4, the token embedding takes 3 bits and is not pruned.

The speech was synthetic: one computer voice. The model has learned that voice, and lost some of what it
knew of real ones. Results on real speech (LibriSpeech), after longer training, are in results/ and in the
README.

To go on:
  usmlite info {packed}
  usmlite transcribe {packed} {example.audio}
  usmlite evaluate {packed} --data {test} --against tiny.en --worst 5"""


def demo_recipe(speech: DemoSpeech, steps: int | None = None) -> Recipe:
    """The demo's recipe."""
    values = {section: dict(table) for section, table in SETTINGS.items()}
    values["data"] = {
        "train": str(speech.train), "dev": str(speech.dev), "test": str(speech.test),
        # The sentences are known to the letter, so the teacher need not transcribe them first.
        "targets": "text", "single": 0.3,
    }  # fmt: skip
    if steps is not None:
        values["training"]["steps"] = steps
    return build_recipe(values, where="demo")


def make_speech(
    output: Path,
    console: Console | None = None,
    *,
    counts: dict[str, int] | None = None,
    voice: Callable[[], Voice] | None = None,
) -> DemoSpeech:
    """Synthesizes the corpora below `output/speech`, unless they are there already.

    Args:
        output: the demo's directory.
        console: shows a bar.
        counts: sentences for each of train, dev and test.
        voice: makes the voice; hibari-tts if None.

    Raises:
        ModelError: hibari-tts is not installed.
        OutputError: the directory is not ours or cannot be written.
    """
    counts = counts or COUNTS
    folder = output / "speech"
    wanted = {"version": _VERSION, "counts": counts}
    speech = DemoSpeech(*(folder / f"{name}.jsonl" for name in ("train", "dev", "test")))
    if _is_complete(folder, wanted):
        return speech
    _claim(output)
    speak = (voice or _hibari)()
    sentences = split_sentences(counts)
    with _bar(console, sum(counts.values())) as advance:
        for name, texts in sentences.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            utterances = []
            for index, text in enumerate(texts):
                utterances.append(_record(speak, text, folder / name / f"{index:04d}.wav", name, index))
                advance()
            write_manifest(folder / f"{name}.jsonl", utterances)
    write_json(folder / _DONE_FILE, wanted)
    return speech


def _record(speak: Voice, text: str, path: Path, name: str, index: int) -> Utterance:
    rng = np.random.default_rng([index, *name.encode()])
    speed = float(rng.choice(SPEEDS))
    clean = speak(text, speed=speed, seed=int(rng.integers(2**31)))
    samples = degrade(clean, rng)
    try:
        soundfile.write(path, samples, VOICE_RATE, subtype="PCM_16")
    except (OSError, soundfile.SoundFileError) as error:
        raise OutputError("cannot be written", where=path, found=str(error)) from None
    return Utterance(f"{name}-{index:04d}", path, len(samples) / VOICE_RATE, text)


def degrade(clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pads with silence, adds noise at a random distance and changes the level.

    Args:
        clean: float32 `[samples]` at `VOICE_RATE`.
        rng: draws everything.

    Returns:
        float32, 0.2 to 0.8 s longer, within -1 and 1.
    """
    before, after = (int(rng.uniform(0.1, 0.4) * VOICE_RATE) for _ in range(2))
    padded = np.pad(clean.astype(np.float64), (before, after))
    noisy = add_noise(padded, rng.uniform(*SNR_DB), rng)
    level = 10 ** (rng.uniform(*LEVEL_DB) / 20)
    peak = max(1e-9, float(np.abs(noisy).max()))
    return (noisy * (0.98 * level / peak)).astype(np.float32)


def _hibari() -> Voice:
    try:
        from hibari import Hibari
    except ImportError:
        raise ModelError(
            "the demo's voice is not installed", where="hibari-tts",
            remedy='Run: pip install "usmlite[demo]"',
        ) from None  # fmt: skip
    voice: Voice = Hibari()
    return voice


def _is_complete(folder: Path, wanted: dict[str, Any]) -> bool:
    try:
        found: Any = json.loads((folder / _DONE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == wanted)


def _claim(output: Path) -> None:
    """Makes the directory, or checks that it holds nothing but an earlier demo."""
    try:
        foreign = [path.name for path in output.iterdir() if path.name not in ("speech", "run")]
    except FileNotFoundError:
        foreign = []
    except OSError as error:
        raise OutputError("cannot use the output directory", where=output, found=error.strerror) from None
    if foreign:
        raise OutputError(
            "the output exists and is not a demo's", where=output, found=", ".join(sorted(foreign)[:3]),
            expected="a new or empty directory", remedy="Name another directory with --out.",
        )  # fmt: skip
    try:
        (output / "speech").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError("cannot make the directory", where=output, found=error.strerror) from None


@contextmanager
def _bar(console: Console | None, total: int) -> Iterator[Callable[[], None]]:
    console = console or Console(quiet=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Synthesizing speech", total=total)
        yield lambda: bar.advance(task)
    console.print(f"Synthesized {total} sentences.")

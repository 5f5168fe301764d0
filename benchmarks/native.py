"""What the native kernels save: single layers and whole transcriptions, against torch in the same run.

    python benchmarks/native.py                                   layers, and the load of the shipped model
    python benchmarks/native.py --data LIBRISPEECH/test --utterances 12
    python benchmarks/native.py --data LIBRISPEECH/test --save    results/native.json, docs/performance.md

Everything is measured by turns, the best of several rounds. The clock is the processor time of this process
on one thread, which other work on the machine changes least; `--wall` takes the clock on the wall
instead, which is what counts for more threads, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import operator
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jiwer
import numpy as np
import torch
from torch import Tensor

from pages import place
from usmlite import entropy, kernels, packfile
from usmlite.atomic import write_json
from usmlite.audio import load_audio
from usmlite.data import Utterance, load_corpus
from usmlite.entropy import Contexts
from usmlite.evaluate import describe_machine, describe_versions
from usmlite.kernels import ExpandedWeight, native
from usmlite.load import load
from usmlite.memory import PeakMemory
from usmlite.shipped import DEFAULT
from usmlite.spec import NM
from usmlite.text import normalize

# rows of activations, inputs, outputs: an encoder window and single tokens of tiny and base, and one of 2048.
SHAPES = (
    (1500, 384, 384),
    (1500, 384, 1536),
    (1500, 1536, 384),
    (1500, 512, 2048),
    (8, 384, 1536),
    (1, 384, 1536),
    (1, 2048, 2048),
    (1, 384, 51864),
)
ROUNDS = 7
TORCH = "torch float32"
HOLDS = ("float32", "int8", "packed")
ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "results" / "native.json", ROOT / "docs" / "performance.md"


Clock = Callable[[], float]


def measure(work: Mapping[str, Callable[[], object]], clock: Clock, rounds: int = ROUNDS) -> dict[str, float]:
    """The best seconds of each of several things, done by turns."""
    repeat = {}
    for name, run in work.items():
        run()
        start = clock()
        run()
        repeat[name] = max(1, int(0.02 / max(clock() - start, 1e-6)))
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            start = clock()
            for _ in range(repeat[name]):
                run()
            best[name] = min(best[name], (clock() - start) / repeat[name])
    return best


def packed_int4(weight: ExpandedWeight, *, pruned: bool) -> kernels.PackedWeight:
    """Some weight of this shape with 4 bits; what is in it makes no difference to its speed."""
    rows, columns = weight.levels.shape
    generator = torch.Generator().manual_seed(0)
    assert weight.step is not None
    layout, pattern, stored = None, None, columns
    if pruned:
        code = NM(2, 4).code
        layout = kernels.PatternLayout(2, 4, code.word_bytes, code.groups)
        words = -(-columns // 4 // code.groups)
        pattern = torch.randint(0, 36, (rows, words), generator=generator, dtype=torch.uint8)
        stored = columns // 2
    codes = torch.randint(0, 16, (rows, stored), generator=generator, dtype=torch.uint8)
    packed = packfile.pack_codes(codes, 4)
    return kernels.PackedWeight(columns, 4, 8.0, None, layout, packed, weight.step.half(), None, pattern)


def layers(clock: Clock) -> list[dict[str, Any]]:
    """Seconds of linear layers in torch and here."""
    rows = []
    for count, inputs, outputs in SHAPES:
        torch.manual_seed(0)
        levels = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        weight = ExpandedWeight(levels, torch.rand(outputs, 1) / 100 + 0.001, None)
        x, bias = torch.randn(count, inputs), torch.randn(outputs)
        work = {"torch float32": _torch_float32(weight, x, bias), "torch int8": _torch_int8(weight, x, bias)}
        for name, form, activations in (
            ("int8", weight, "int8"),
            ("int8, float32 activations", weight, "float32"),
            ("int4", packed_int4(weight, pruned=False), "int8"),
            ("int4 2:4", packed_int4(weight, pruned=True), "int8"),
        ):
            prepared = native.prepare(form, activations)  # type: ignore[arg-type]
            assert prepared is not None
            work[name] = _native(prepared, x, bias)
        seconds = measure({name: run for name, run in work.items() if run is not None}, clock)
        rows.append({"shape": [count, inputs, outputs], "seconds": seconds})
    return rows


def _native(weight: kernels.NativeWeight, x: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    return lambda: native.linear(x, weight, bias)


def _torch_float32(weight: ExpandedWeight, x: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    dense = kernels.unpack(weight)
    return lambda: torch.nn.functional.linear(x, dense, bias)


def _torch_int8(weight: ExpandedWeight, x: Tensor, bias: Tensor) -> Callable[[], Tensor] | None:
    """Dynamic quantization of torch: codes of one byte, activations rounded in every call."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    quantized = torch.quantize_per_tensor(kernels.unpack(weight), 0.01, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed)


def decoding(clock: Clock) -> dict[str, float]:
    """Seconds for 4 million entropy-coded codes of 8 bits in 13 tables, like the shipped model's."""
    rng = np.random.default_rng(0)
    shape = (8000, 500)
    levels = rng.integers(0, 7, shape[0]).astype(np.uint8), rng.integers(0, 7, shape[1]).astype(np.uint8)
    widths = 3 * np.exp2((levels[0][:, None] + levels[1]) / 4)
    codes = np.clip(np.round(rng.normal(128, widths)), 0, 255).astype(np.uint8)
    coded = entropy.encode(codes, 8, Contexts(*levels, 0, 13))

    def decode(kernels: str) -> None:
        with mock.patch.dict(os.environ, {native.VARIABLE: kernels}):
            entropy.decode(coded, 8, shape, 13)

    best = native.paths()[0]
    return measure({"NumPy": lambda: decode("reference"), "native": lambda: decode(best)}, clock, rounds=3)


def loading(model: str, clock: Clock) -> dict[str, float]:
    """Seconds to load a packed model, by how it is held."""
    return measure({hold: lambda hold=hold: load(model, hold=hold) for hold in HOLDS}, clock)  # type: ignore[misc]


def memory(model: str) -> dict[str, int]:
    """Bytes that loading a model and transcribing 30 seconds adds to a process, by how it is held."""
    found = {}
    for hold in HOLDS:
        command = [sys.executable, __file__, "--model", model, "--memory-of", hold]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[hold] = int(done.stdout)
    return found


def memory_of(model: str, hold: str) -> int:
    """The same for one of them, in this process."""
    noise = np.random.default_rng(0).normal(0, 0.01, 30 * 16_000).astype(np.float32)
    before = PeakMemory().read()[0]
    peak = PeakMemory()
    load(model, hold=hold).transcribe_batch([noise])  # type: ignore[arg-type]
    return peak.read()[0] - before


def transcriptions(model: str, utterances: Sequence[Utterance], batch: int, clock: Clock) -> dict[str, Any]:
    """Seconds to transcribe, one model expanded and the others not; wrong words, and texts that differ."""
    ways = [("float32", "int8"), ("int8", "int8"), ("packed", "int8"), ("int8", "float32")]
    models = {
        f"{hold}, {activations} activations" if hold != "float32" else TORCH: load(
            model,
            hold=hold,  # type: ignore[arg-type]
            activations=activations,  # type: ignore[arg-type]
        )
        for hold, activations in ways
    }
    audios = [load_audio(utterance.audio)[: 30 * 16_000] for utterance in utterances]
    texts: dict[str, list[str]] = {name: [] for name in models}
    seconds = dict.fromkeys(models, 0.0)
    for low in range(0, len(audios), batch):
        part = audios[low : low + batch]
        for name, recognizer in models.items():
            if not low:
                recognizer.transcribe_batch(part)  # what only the first call does
            start = clock()
            texts[name] += recognizer.transcribe_batch(part)
            seconds[name] += clock() - start
    references = [normalize(utterance.text or "") for utterance in utterances]
    counts = {
        name: jiwer.process_words(references, [normalize(text) for text in found])
        for name, found in texts.items()
    }
    return {
        "batch": batch,
        "utterances": len(audios),
        "words": sum(len(reference.split()) for reference in references),
        "audio_seconds": sum(len(samples) for samples in audios) / 16_000,
        "seconds": seconds,
        "errors": {name: c.substitutions + c.deletions + c.insertions for name, c in counts.items()},
        "different_texts": {
            name: sum(map(operator.ne, found, texts[TORCH])) for name, found in texts.items()
        },
    }


def table(title: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Times relative to the first column, which shows its own in milliseconds."""
    names = list(dict.fromkeys(name for _, seconds in rows for name in seconds))
    lines = [
        f"| {title} | {names[0]}, ms | " + " | ".join(names[1:]) + " |",
        "| --- |" + " --: |" * len(names),
    ]
    for label, seconds in rows:
        first = seconds[names[0]]
        ratios = [f"{first / seconds[name]:.2f}" if name in seconds else "" for name in names[1:]]
        lines.append(f"| {label} | {1e3 * first:.3f} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def page(result: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md."""
    machine, versions = result["machine"], result["versions"]
    parts = [
        f"{machine['cpu']}, {result['threads']} thread{'s' if result['threads'] > 1 else ''}, "
        f"{machine['kernels']}, torch {versions['torch']}; {result['clock']}. "
        "The first column of times is in milliseconds, the others say how many times as fast as it they are."
    ]
    shown = [(" x ".join(map(str, row["shape"])), row["seconds"]) for row in result.get("layers", ())]
    if shown:
        parts.append(table("rows x inputs x outputs", shown))
    rows = [("rANS, 4 million codes", result["decoding"])] if "decoding" in result else []
    if rows:
        parts.append(table("", rows))
    parts.append(table("", [(f"load `{result['model']}`", result["loading"])]))
    if "transcriptions" in result:
        found = result["transcriptions"]
        shown = [(f"{r['utterances']} utterances, {r['batch']} at a time", r["seconds"]) for r in found]
        parts.append(table("", shown))
        parts.append(differences(found[0]))
    held = ", ".join(f"{1e-6 * size:.0f} MB held as {hold}" for hold, size in result["memory"].items())
    parts.append(f"Loading and transcribing 30 seconds adds to the process's peak memory: {held}.")
    return "\n\n".join(parts)


def differences(found: Mapping[str, Any]) -> str:
    """Wrong words by how a model was held, and texts that are not the same."""
    lines = [
        f"| {found['utterances']} utterances, {found['words']} words, one at a time | errors | WER, % "
        "| texts other than torch's |",
        "| --- | --: | --: | --: |",
    ]
    for name, errors in found["errors"].items():
        share = 100 * errors / found["words"]
        lines.append(f"| {name} | {errors} | {share:.2f} | {found['different_texts'][name]} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT, help="a packed model (default: the shipped one)")
    parser.add_argument(
        "--data", type=Path, help="a LibriSpeech split, or any corpus with texts, to transcribe"
    )
    parser.add_argument("--utterances", type=int, default=12, help="how many of it (default: 12)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--wall", action="store_true", help="clock on the wall, not processor time")
    parser.add_argument("--no-layers", action="store_true", help="skip single layers")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name} and its tables")
    parser.add_argument("--memory-of", choices=HOLDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(memory_of(options.model, options.memory_of))
        return 0
    if native.chosen() is None:
        print("the native library is not there, or was not chosen", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    result: dict[str, Any] = {
        "model": options.model,
        "threads": options.threads,
        "clock": "wall clock" if options.wall else "processor time",
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    if not options.no_layers:
        result |= {"layers": layers(clock), "decoding": decoding(clock)}
    result |= {"loading": loading(options.model, clock), "memory": memory(options.model)}
    if options.data is not None:
        found = sorted(load_corpus(options.data, require_text=True), key=lambda utterance: utterance.id)
        chosen = found[:: max(1, len(found) // options.utterances)][: options.utterances]
        result["transcriptions"] = [transcriptions(options.model, chosen, n, clock) for n in (1, 8)]
    print(page(result))
    if options.save:
        write_json(RESULT, result)
        place(PAGE, "native", page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

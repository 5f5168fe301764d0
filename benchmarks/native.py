"""What the native kernels save: single layers and whole transcriptions, against torch in the same run.

    python benchmarks/native.py                                   layers, and the load of the shipped model
    python benchmarks/native.py --data LIBRISPEECH/test --utterances 12
    python benchmarks/native.py --json results/native.json

Every figure is a ratio to the first column of its table, measured by turns: the best of several rounds. Times
depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from usmlite import entropy, kernels, packfile
from usmlite.atomic import write_json
from usmlite.audio import load_audio
from usmlite.evaluate import describe_machine, describe_versions
from usmlite.kernels import ExpandedWeight, native
from usmlite.load import load
from usmlite.shipped import DEFAULT
from usmlite.spec import NM

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


def measure(work: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """The best seconds of each of several things, done by turns."""
    repeat = {}
    for name, run in work.items():
        run()
        start = time.perf_counter()
        run()
        repeat[name] = max(1, int(0.02 / (time.perf_counter() - start)))
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            start = time.perf_counter()
            for _ in range(repeat[name]):
                run()
            best[name] = min(best[name], (time.perf_counter() - start) / repeat[name])
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


def layers() -> list[dict[str, Any]]:
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
        seconds = measure({name: run for name, run in work.items() if run is not None})
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


def decoding() -> dict[str, float]:
    """Seconds for 4 million entropy-coded codes."""
    rng = np.random.default_rng(0)
    codes = np.clip(np.round(rng.normal(128, 3, 4_000_000)), 0, 255).astype(np.uint8)
    coded = entropy.encode(codes, 8, 64)
    return measure(
        {
            "NumPy": lambda: entropy.reference_decode(coded, 8, codes.size, 64),
            "native": lambda: native.decode_codes(coded, 8, codes.size, 64),
        },
        rounds=3,
    )


def loading(model: str) -> dict[str, float]:
    """Seconds to load a packed model, by how it is held."""
    return measure({hold: lambda hold=hold: load(model, hold=hold) for hold in ("float32", "int8", "packed")})  # type: ignore[misc]


def transcriptions(model: str, audios: Sequence[np.ndarray], batch: int) -> dict[str, Any]:
    """Seconds to transcribe, one model expanded and the others not, and how many texts differ."""
    holds = ("float32", "int8", "packed")
    models = {hold: load(model, hold=hold) for hold in holds}  # type: ignore[arg-type]
    texts: dict[str, list[str]] = {}
    seconds = dict.fromkeys(holds, 0.0)
    for low in range(0, len(audios), batch):
        for hold, recognizer in models.items():
            part = audios[low : low + batch]
            if not low:
                recognizer.transcribe_batch(part)  # what only the first call does
            start = time.perf_counter()
            texts.setdefault(hold, []).extend(recognizer.transcribe_batch(part))
            seconds[hold] += time.perf_counter() - start
    different = {
        hold: sum(a != b for a, b in zip(found, texts["float32"], strict=True))
        for hold, found in texts.items()
    }
    audio = sum(len(samples) for samples in audios) / 16_000
    return {"batch": batch, "audio_seconds": audio, "seconds": seconds, "different_texts": different}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT, help="a packed model (default: the shipped one)")
    parser.add_argument(
        "--data", type=Path, help="a LibriSpeech split, or any folder of audio, to transcribe"
    )
    parser.add_argument("--utterances", type=int, default=12, help="how many of its files (default: 12)")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--no-layers", action="store_true", help="skip single layers")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if native.chosen() is None:
        print("the native library is not there, or was not chosen", file=sys.stderr)
        return 1
    result: dict[str, Any] = {"machine": describe_machine(), "versions": describe_versions()}
    print(
        f"{kernels.implementation()}, {torch.get_num_threads()} threads; times as often as the first column\n"
    )
    if not options.no_layers:
        result["layers"] = layers()
        shown = [(" x ".join(map(str, row["shape"])), row["seconds"]) for row in result["layers"]]
        print(table("rows x inputs x outputs", shown), end="\n\n")
        result["decoding"] = decoding()
        print(table("", [("rANS, 4 million codes", result["decoding"])]), end="\n\n")
    result["loading"] = loading(options.model)
    print(table("", [(f"load {options.model}", result["loading"])]), end="\n\n")
    if options.data is not None:
        files = sorted(p for p in options.data.rglob("*") if p.suffix in (".flac", ".wav"))
        audios = [load_audio(path)[: 30 * 16_000] for path in files[: options.utterances]]
        result["transcriptions"] = [transcriptions(options.model, audios, batch) for batch in (1, 8)]
        shown = [
            (f"{len(audios)} utterances by {r['batch']}", r["seconds"]) for r in result["transcriptions"]
        ]
        print(table("", shown))
        print(f"different texts: {result['transcriptions'][0]['different_texts']}")
    if options.json is not None:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

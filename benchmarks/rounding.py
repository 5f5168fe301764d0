"""What each way of rounding one weight costs at how many bytes: the second figure of docs/how-it-works.md.

    python benchmarks/rounding.py             measures, writes results/rounding.json and the figure
    python benchmarks/rounding.py --draw      only draws the figure again

One weight of a real model, rounded for what it is given on synthetic speech that is made on the spot; the
error is that of its output on other sentences. Bytes are those of codes and scales as in the packed file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import torch
import vl_convert
from torch import Tensor

from usmlite import entropy, quantize
from usmlite.atomic import write_bytes, write_json
from usmlite.audio import load_audio
from usmlite.data import load_corpus
from usmlite.demo import make_speech
from usmlite.evaluate import describe_machine, describe_versions
from usmlite.models import Teacher, load_teacher
from usmlite.moments import Moments
from usmlite.report import vega
from usmlite.report.theme import LIGHT, PAPER_FONT, config
from usmlite.solve import Problem, relative_error, solve
from usmlite.spec import Int, LayerSpec

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "results/rounding.json"
FIGURE = ROOT / "docs/figures/rounding.svg"
MODEL, LAYER = "tiny.en", "model.encoder.layers.1.fc2"
SENTENCES = {"train": 72, "dev": 24, "test": 1}
BITS = (2, 3, 4, 5)
RATES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
WINDOW, FRAMES = 480_000, 1500  # samples, and what the encoder makes of them

NEAREST = "nearest, scale from the largest weight"
FITTED = "nearest, scale of least error"
SECOND_ORDER = "second-order rounding"
CODED = "the same, entropy-coded"
RATE = "a rate: no clipping, steps by column"
WAYS = (NEAREST, FITTED, SECOND_ORDER, CODED, RATE)


def inputs_of(teacher: Teacher, manifest: Path) -> Tensor:
    """What the layer is given on some speech, float32 `[vectors, columns]`, sentence after sentence."""
    samples = np.concatenate([load_audio(utterance.audio) for utterance in load_corpus(manifest)])
    windows = torch.from_numpy(samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW))
    rows: list[Tensor] = []
    layer = teacher.model.get_submodule(LAYER)
    hook = layer.register_forward_pre_hook(lambda _, given: rows.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        for window in windows:
            teacher.model.get_encoder()(teacher.adapter.features(window[None]))
    hook.remove()
    return torch.cat(rows)


def moments_of(rows: Tensor) -> Moments:
    """The moments of some vectors, `[vectors, columns]`."""
    shift = rows.mean(dim=0)
    centred = rows - shift
    return Moments(centred.T @ centred, torch.zeros_like(shift), shift, float(len(rows)))


def ways(weight: Tensor, moments: Moments) -> Iterator[tuple[str, Tensor, float]]:
    """Every way to round a weight: its name, the rounded weight, bits a weight."""
    scale_bits = 16 / weight.shape[1]
    for bits in BITS:
        quant = Int(bits)
        fitted = quantize.min_error(weight, None, quant, None)
        for name, (scale, zero) in ((NEAREST, quantize.min_max(weight, quant, None)), (FITTED, fitted)):
            values = quantize.fake_quantize(weight, None, scale, zero, quant, None)
            yield name, values, bits + scale_bits
        found = solve(weight, moments.covariance, LayerSpec(quant=quant))
        yield SECOND_ORDER, found.values, bits + scale_bits
        codes = quantize.quantize(found.values, found.scale, None, quant, None)
        yield CODED, found.values, coded_bits(codes, quant) + scale_bits
    quant = Int(8, scale_bits=8)
    problem = Problem.of(weight, moments, biased=True, damping=0.01)
    for rate in RATES:
        scale, column_scale = problem.rate_scales(quant, rate, None)
        spec = LayerSpec(quant=quant, column_scales=True, rate=rate)
        found = solve(weight, moments.covariance, spec, scale=scale, column_scale=column_scale)
        codes = quantize.quantize(found.values, found.scale, None, quant, None)
        scales = 8 * (len(scale) + len(column_scale)) / weight.numel()
        yield RATE, found.values * column_scale, coded_bits(codes, quant) + scales


def coded_bits(codes: Tensor, quant: Int) -> float:
    """Bits that entropy coding takes for a code, tables and all."""
    array = codes.to(torch.uint8).numpy()
    return 8 * len(entropy.encode(array, quant.bits, entropy.best_contexts(array, quant.bits))) / array.size


def measure() -> dict[str, Any]:
    """Everything that the figure shows."""
    teacher = load_teacher(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        speech = make_speech(Path(folder) / "demo", counts=SENTENCES)
        seen, held_out = inputs_of(teacher, speech.train), inputs_of(teacher, speech.dev)
    weight = teacher.model.get_submodule(LAYER).weight.detach()
    moments, judge = moments_of(seen), moments_of(held_out).covariance
    points = [
        {"way": name, "bits": round(bits, 4), "error": round(relative_error(weight, values, judge), 6)}
        for name, values, bits in ways(weight, moments)
    ]
    return {
        "model": MODEL, "layer": LAYER, "points": points,
        "windows": [len(seen) // FRAMES, len(held_out) // FRAMES],
        "machine": describe_machine(), "versions": describe_versions(),
    }  # fmt: skip


def drawn(measured: Mapping[str, Any]) -> bytes:
    """The figure as SVG."""
    axes = alt.Chart(alt.Data(values=measured["points"])).encode(
        x=alt.X("bits:Q", title="bits a weight in the file").scale(domain=(1, 5.2), nice=False),
        y=alt.Y("error:Q", title="error of the layer's output, relative")
        .scale(type="log", domain=(0.0003, 3), clamp=True)
        .axis(format="~%", values=[0.001, 0.01, 0.1, 1]),
        color=alt.Color("way:N", title=None).scale(domain=list(WAYS)),
    )
    shape = alt.Shape("way:N", title=None).scale(domain=list(WAYS))
    points = axes.mark_point(filled=True, size=70, opacity=1).encode(shape=shape)
    spec = (axes.mark_line(strokeWidth=2) + points).properties(width=420, height=300).to_dict()
    svg = vl_convert.vegalite_to_svg(
        spec, vl_version=vega.converter_version(), config=config(LIGHT, font=PAPER_FONT)
    )
    return f"{svg}\n".encode()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help=f"only draw what is in {RESULT.name}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and draws."""
    if not build_parser().parse_args(arguments).draw:
        write_json(RESULT, measure())
    measured = json.loads(RESULT.read_text(encoding="utf-8"))
    for point in measured["points"]:
        print(f"{point['bits']:6.3f} bits  {100 * point['error']:8.3f} %  {point['way']}")
    write_bytes(FIGURE, drawn(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Damaged packed models, one after the other: each must load or be refused with one of our errors.

    python tests/fuzz.py [--seconds 600] [--seed 0]

`make fuzz` runs it, and the native library's own driver under sanitizers. A child process does the work, so
that a crash is a finding and not the end; a finding is shown with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from small_whisper import logits, small_student
from usmlite.errors import UsmliteError
from usmlite.kernels import native
from usmlite.models import engine
from usmlite.pack import pack
from usmlite.packed import HOLDS, load_packed
from usmlite.packfile import CONFIG_NAME, WEIGHTS_NAME, WeightsFile
from usmlite.spec import CompressionSpec, Int, LayerSpec, Rule

SPECS = (
    CompressionSpec.simple(4, "2:4"),
    CompressionSpec(
        (
            Rule("*.fc1", LayerSpec(Int(3, symmetric=False), group=8)),
            Rule("*.q_proj", LayerSpec(Int(2, grid="ternary", scale_bits=8))),
            Rule("*.v_proj", CompressionSpec.simple(3, "3:7").rules[-1].spec),
            *CompressionSpec.simple(5).rules,
        )
    ),
    CompressionSpec(
        (
            Rule("*.fc?", LayerSpec.at_rate(2.5, 8)),
            Rule("*.embed_tokens", LayerSpec.at_rate(3.0, 32)),
            *CompressionSpec.simple(4).rules,
        )
    ),
)
# In one child, so that what piles up does not.
_CASES = 100
_VALUES = (0, 1, -1, 2, 7, 8, 9, 64, 65, 256, 2**31, 2**62, -(2**63), 0.5, 1e300, None, True, "8", [], {})


def make_models(folder: Path) -> list[Path]:
    """Small packed models with random weights, some of them entropy-coded."""
    made = []
    for index, spec in enumerate(SPECS):
        for coded in (True, False):
            student, adapter = small_student(spec)
            made.append(folder / f"{index}-{coded}")
            pack(student, adapter, made[-1], coded=coded)
    return made


def damage(folder: Path, rng: random.Random) -> None:
    """Changes something in a packed model; mostly its digest is made to agree."""
    for change in rng.sample(
        (change_bytes, change_bytes, change_config, change_length), rng.choice((1, 1, 1, 2))
    ):
        change(folder, rng)
    if rng.random() < 0.8:
        try:
            digest = WeightsFile(folder / WEIGHTS_NAME).digest()
            config = json.loads((folder / CONFIG_NAME).read_text())
            config["quantization_config"]["digest"] = digest
        except (UsmliteError, ValueError, TypeError, KeyError):
            return
        (folder / CONFIG_NAME).write_text(json.dumps(config))


def change_bytes(folder: Path, rng: random.Random) -> None:
    """A few bytes of the weights file, anywhere, or near each other."""
    path = folder / rng.choice((WEIGHTS_NAME, WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME))
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    for _ in range(rng.choice((1, 1, 3, 20, 300))):
        place = (
            rng.randrange(len(data)) if rng.random() < 0.3 else min(len(data) - 1, start + rng.randrange(64))
        )
        data[place] = rng.choice((0, 255, data[place] ^ (1 << rng.randrange(8)), rng.randrange(256)))
    path.write_bytes(data)


def change_length(folder: Path, rng: random.Random) -> None:
    """Cut off, or continued."""
    path = folder / rng.choice((WEIGHTS_NAME, CONFIG_NAME))
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + rng.randbytes(9))


def change_config(folder: Path, rng: random.Random) -> None:
    """A value somewhere in the manifest: another one, or gone."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
        place: Any = config["quantization_config"] if rng.random() < 0.9 else config
    except (ValueError, TypeError, KeyError):
        return
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if not isinstance(place[key], (dict, list)) or rng.random() < 0.1:
            if isinstance(place, dict) and rng.random() < 0.2:
                del place[key]
            elif isinstance(place[key], int) and rng.random() < 0.5:
                place[key] += rng.choice((-8, -1, 1, 8))
            else:
                place[key] = rng.choice(_VALUES)
            break
        place = place[key]
    path.write_text(json.dumps(config))


def run_case(models: Sequence[Path], folder: Path, seed: int) -> str:
    """Damages a model, loads it and computes with it; what became of it."""
    rng = random.Random(seed)
    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(rng.choice(models), target)
    damage(target, rng)
    try:
        model, _ = load_packed(target, hold=rng.choice(HOLDS), activations=rng.choice(("int8", "float32")))
    except UsmliteError as error:
        return f"refused: {type(error).__name__}"
    logits(model)
    with torch.inference_mode():
        encoded = engine.encode(model, torch.randn(1, 8, 3000))
        decoder = engine.native_decoder(model, encoded)
        if decoder is not None:
            decoder.logits(decoder.step(torch.tensor([[257, 263]]))[:, -1])
    return "loaded"


def run_cases(models: Sequence[Path], folder: Path, first: int, results: Any) -> None:
    """In the child: some cases, each announced before it runs."""
    warnings.simplefilter("ignore")
    for seed in range(first, first + _CASES):
        results.put((seed, None))
        try:
            results.put((seed, run_case(models, folder, seed)))
        except BaseException:
            results.put((seed, traceback.format_exc()))
            return


def child(work: Callable[..., None], *arguments: Any) -> tuple[int, list[tuple[int, str | None]]]:
    """Runs work in a process of its own; its exit code and what it put into its queue."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=work, args=(*arguments, results))
    process.start()
    found = []
    while process.is_alive() or not results.empty():
        if results.empty():
            process.join(0.05)
        else:
            found.append(results.get())
    return process.exitcode or 0, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs cases until the time is over or there is a finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # before anything forks
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        models, seed = make_models(Path(place)), options.seed
        stop = time.monotonic() + options.seconds
        while time.monotonic() < stop:
            code, found = child(run_cases, models, Path(place), seed)
            counts.update(said for _, said in found if said is not None)
            last, said = found[-1]
            if code or said is None or said.startswith("Traceback"):
                print(f"seed {last}: exit code {code}\n{said or 'a crash'}", file=sys.stderr)
                return 1
            seed += _CASES
    print(f"{counts.total()} cases, kernels {native.chosen() or 'reference'}: {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

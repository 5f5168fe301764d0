"""A synthetic Conformer-CTC of two billion weights, packed weight by weight, mapped, and run on the CPU.

    python benchmarks/two_billion.py [--layers 32] [--scratch DIR]

Writes random weights in bfloat16 shards (3.5 GB for 32 layers; 5 GB of room are needed, and given back),
packs them with `usmlite compress --streamed`, and transcribes some seconds of noise from the mapped file.
Packing and running are processes of their own, whose peak resident memory goes to results/two_billion.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "recipes/conformer-2b/config.json"
SHARD_BYTES = 1 << 30
SECONDS = 10.0


def main() -> None:
    """Runs everything, or the one stage that --stage names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--scratch", type=Path, help="where the model is written (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/two_billion.json")
    parser.add_argument("--stage", choices=("pack", "run"), help="internal")
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps({"pack": pack, "run": run}[arguments.stage](arguments.scratch)))
        return
    from usmlite.evaluate import describe_machine, describe_versions

    scratch = Path(tempfile.mkdtemp(dir=arguments.scratch))
    try:
        parameters, dense = make(scratch / "dense", arguments.layers)
        stages = {stage: in_a_process(stage, scratch) for stage in ("pack", "run")}
    finally:
        shutil.rmtree(scratch)
    result = {
        "machine": describe_machine(), "versions": describe_versions(), "layers": arguments.layers,
        "parameters": parameters, "dense_file_bytes": dense, **stages,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def in_a_process(stage: str, scratch: Path) -> dict[str, Any]:
    """One stage, alone."""
    command = [sys.executable, __file__, "--stage", stage, "--scratch", str(scratch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make(folder: Path, layers: int) -> tuple[int, int]:
    """Writes the model; returns its parameters and the bytes of its shards."""
    import torch
    from safetensors.torch import save_file
    from transformers import LasrFeatureExtractor, LasrTokenizer

    from usmlite.models import read_configuration, skeleton
    from usmlite.packfile import stored_tensors
    from usmlite.streamed import INDEX

    values = json.loads(CONFIG.read_text(encoding="utf-8"))
    values["encoder_config"]["num_hidden_layers"] = layers
    config = read_configuration(values, CONFIG)
    config.save_pretrained(folder)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz'"]
    pieces += [f"▁{number}" for number in range(values["vocab_size"] - len(pieces))]
    LasrTokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0).save_pretrained(folder)
    LasrFeatureExtractor().save_pretrained(folder)
    outline = skeleton(config)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, empty in stored_tensors(outline).items():
        if not empty.is_floating_point():
            value = torch.zeros(empty.shape, dtype=empty.dtype)
        elif empty.dim() == 1:
            ones = name.endswith(("norm.weight", "running_var")) or "norm" in name.split(".")[-2]
            value = torch.full(empty.shape, float(ones and not name.endswith(("bias", "running_mean"))))
        else:
            fan = empty.numel() // empty.shape[0]
            value = torch.randn(empty.shape, generator=generator).mul_(fan**-0.5)
        shard[name] = value.bfloat16() if value.is_floating_point() else value
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    return parameters, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def pack(scratch: Path) -> dict[str, Any]:
    """Packs as the command does: int4 with 2:4, min-max scales, fixed-width codes."""
    from usmlite.cli import main as usmlite
    from usmlite.memory import PeakMemory

    memory, started = PeakMemory(), time.perf_counter()
    code = usmlite(
        ["compress", str(scratch / "dense"), "--no-finetune", "--start", "magnitude", "--streamed",
         "--scales", "min-max", "--no-entropy-coding", "--out", str(scratch / "run")]
    )  # fmt: skip
    assert code == 0
    size = (scratch / "run/packed/model.safetensors").stat().st_size
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "peak_memory_bytes": memory.read()[0], "packed_bytes": size}


def run(scratch: Path) -> dict[str, Any]:
    """Loads the mapped file and transcribes noise."""
    import numpy as np

    import usmlite
    from usmlite.memory import PeakMemory

    memory, started = PeakMemory(), time.perf_counter()
    recognizer = usmlite.load(scratch / "run", hold="mapped")
    loaded = time.perf_counter()
    noise = np.random.default_rng(0).normal(0, 0.1, round(SECONDS * 16_000)).astype(np.float32)
    found = recognizer.transcribe(noise)
    return {
        "load_seconds": round(loaded - started, 1),
        "transcribe_seconds": round(time.perf_counter() - loaded, 1),
        "audio_seconds": SECONDS,
        "characters": len(found.text),
        "peak_memory_bytes": memory.read()[0],
    }


if __name__ == "__main__":
    main()

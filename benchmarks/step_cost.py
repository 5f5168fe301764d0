"""What compression adds to a distillation step: the same step with a compressed and a dense student.

    python benchmarks/step_cost.py --model tiny.en [--steps 8] [--json results/step_cost.json]

Both students take turns, step by step, on the same batch, so that a machine whose speed drifts slows
both alike. The step is the training loop's: teacher and student forward, backward, clipping, AdamW,
and the mask update. On a GPU when there is one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from usmlite.atomic import write_json
from usmlite.distill import Distillation, LossWeights
from usmlite.evaluate import describe_machine, describe_versions
from usmlite.finetune import autocast_precision, make_optimizer
from usmlite.load import student_options
from usmlite.models import TimedText, load_teacher
from usmlite.movement import attach
from usmlite.recipe import build_recipe
from usmlite.student import make_student

TEXT = "the quick brown fox jumps over the lazy dog and runs along the river until the sun goes down " * 4


class Trainee:
    """One student with its optimizer."""

    def __init__(self, teacher, spec: dict[str, object], device: torch.device) -> None:
        self.recipe = build_recipe({"spec": spec})
        adapter = teacher.adapter
        self.student = make_student(
            teacher.model,
            adapter.compressible(teacher.model),
            self.recipe.spec.build(),
            student_options(self.recipe),
            computed=adapter.computed(teacher.model),
        ).to(device)
        self.optimizer = make_optimizer(self.student, self.recipe)
        attach(self.student, self.optimizer)
        self.distillation = Distillation(self.student, teacher.model, LossWeights())
        self.seconds: list[float] = []

    def step(self, batch: dict[str, torch.Tensor], bf16: bool, device: torch.device) -> None:
        """One training step, timed."""
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            losses = self.distillation(**batch)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny.en")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = autocast_precision("auto", device) == "bf16"
    teacher = load_teacher(arguments.model)
    teacher.model.to(device)
    samples = 0.1 * torch.randn(arguments.batch_size, 480_000, generator=torch.Generator().manual_seed(0))
    features = teacher.adapter.features(samples.to(device))
    texts = [[TimedText(0.0, 30.0, TEXT)]] * arguments.batch_size
    ids, labels = teacher.adapter.targets(texts, timestamps=[False] * arguments.batch_size)
    batch = {
        "heard": features,
        "taught": features,
        "decoder_input_ids": ids.to(device),
        "labels": labels.to(device),
    }

    specs: dict[str, dict[str, object]] = {
        "dense": {"bits": "float", "sparsity": "dense"},
        "int4 2:4": {"bits": 4, "sparsity": "2:4"},
        "int3": {"bits": 3, "sparsity": "dense"},
    }
    trainees = {name: Trainee(teacher, spec, device) for name, spec in specs.items()}
    for number in range(arguments.steps + 2):
        for trainee in trainees.values():
            trainee.step(batch, bf16, device)
            if number < 2:  # warm-up
                trainee.seconds.clear()
    dense = trainees["dense"].seconds
    rows = {}
    for name, trainee in trainees.items():
        ratios = [ours / theirs for ours, theirs in zip(trainee.seconds, dense, strict=True)]
        rows[name] = {"seconds": statistics.median(trainee.seconds), "ratio": statistics.median(ratios)}
        print(
            f"{name:10} {rows[name]['seconds']:.3f} s a step, {rows[name]['ratio']:.3f} times the dense step"
        )
    if arguments.json:
        settings = {"model": arguments.model, "batch_size": arguments.batch_size, "steps": arguments.steps,
                    "bf16": bf16, "device": str(device)}  # fmt: skip
        machine = {"machine": describe_machine(), "versions": describe_versions()}
        write_json(arguments.json, {"settings": settings, "students": rows, **machine})


if __name__ == "__main__":
    main()

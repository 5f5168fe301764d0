"""What `usmlite plan` says of memory against what real fine-tuning steps took. Writes results/plan.json.

    python benchmarks/plan.py

Each case fine-tunes a model for three steps on noise, in a process of its own, and reads the peak of its
resident memory; another process plans the same recipe from the configuration alone. `tiny.en` has its real
weights, the others random ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 3
_CONFORMER = {"num_attention_heads": 4, "conv_kernel_size": 5, "attention_bias": False}
MODELS: dict[str, dict[str, Any]] = {
    "LASR, 6 x 256": {
        "model_type": "lasr_ctc", "encoder_config": {
            **_CONFORMER, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024},
    },
    "LASR, 12 x 512": {
        "model_type": "lasr_ctc", "encoder_config": {
            **_CONFORMER, "hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048},
    },
    "wav2vec 2.0, 4 x 384": {
        "model_type": "wav2vec2", "hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
        "intermediate_size": 1536,
    },
}  # fmt: skip
CASES = (
    ("tiny.en", 1, False),
    ("tiny.en", 4, False),
    ("tiny.en", 4, True),
    ("LASR, 6 x 256", 1, False),
    ("LASR, 6 x 256", 4, False),
    ("LASR, 12 x 512", 2, False),
    ("LASR, 12 x 512", 2, True),
    ("wav2vec 2.0, 4 x 384", 2, False),
)
_WORDS = "it was the best of times and the worst of times in the age of wisdom " * 5


def main() -> None:
    """Runs every case and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/plan.json")
    parser.add_argument("--case", help="internal: one case as JSON")
    parser.add_argument("--plan", action="store_true", help="internal: plan instead of measuring")
    arguments = parser.parse_args()
    if arguments.case:
        case = json.loads(arguments.case)
        print(json.dumps(planned(case) if arguments.plan else measured(case)))
        return
    from usmlite.evaluate import describe_machine, describe_versions

    rows = []
    for model, batch, recompute in CASES:
        with tempfile.TemporaryDirectory() as folder:
            case = {"model": model, "batch": batch, "recompute": recompute, "folder": folder}
            found = {**run(case), **run(case, "--plan")}
        ratio = found["planned_bytes"] / found["measured_bytes"]
        rows.append(
            {"model": model, "batch": batch, "recompute": recompute, **found, "ratio": round(ratio, 4)}
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {"machine": describe_machine(), "versions": describe_versions(), "steps": STEPS, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(case: dict[str, Any], *flags: str) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case), *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def recipe(case: dict[str, Any], **more: Any) -> Any:
    """The recipe of a case: int4 with 2:4, all terms of the loss."""
    from usmlite.recipe import build_recipe

    training = {"steps": STEPS, "batch_size": case["batch"], "recompute": case["recompute"], **more}
    return build_recipe(
        {"training": training, "student": {"start": "magnitude"}, "data": {"targets": "text"}}
    )


def planned(case: dict[str, Any]) -> dict[str, Any]:
    """What the plan says."""
    from usmlite.devices import this_machine
    from usmlite.plan import make_plan

    source = case["model"]
    if source in MODELS:
        source = Path(case["folder"]) / "model/config.json"
    plan = make_plan(source, recipe(case), this_machine(), engines=("single",))
    setting = next(each for each in plan.memory if each.recompute == case["recompute"])
    return {"parameters": plan.parameters, "planned_bytes": int(setting.peak)}


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """What real steps take."""
    import numpy as np
    import soundfile

    from usmlite.data import Utterance
    from usmlite.finetune import finetune
    from usmlite.models import load_teacher
    from usmlite.student import make_student

    folder = Path(case["folder"])
    source: Any = case["model"]
    if source in MODELS:
        source = save_model(folder / "model", MODELS[source])
    teacher, settings = load_teacher(source), recipe(case)
    speech = []
    for number in range(case["batch"] * STEPS):
        samples = np.random.default_rng(number).normal(0, 0.1, 29 * 16000).astype(np.float32)
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        text = teacher.adapter.written(_WORDS.strip())
        speech.append(Utterance(str(number), folder / f"{number}.wav", 29.0, text))
    adapter = teacher.adapter
    student = make_student(
        teacher.model, adapter.compressible(teacher.model), settings.spec.build(),
        computed=adapter.computed(teacher.model),
    )  # fmt: skip
    outcome = finetune(student, teacher.model, adapter, speech, settings, folder)
    return {
        "measured_bytes": outcome.peak_memory_bytes,
        "seconds_per_step": round(outcome.seconds / STEPS, 2),
    }


def save_model(folder: Path, values: dict[str, Any]) -> Path:
    """A model of random weights with a tokenizer of letters, as Transformers saves it."""
    import torch
    import transformers

    from usmlite.models import read_configuration

    kind = {"lasr_ctc": "LasrForCTC", "wav2vec2": "Wav2Vec2ForCTC"}[values["model_type"]]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz'"]
    config = read_configuration({**values, "vocab_size": 64, "pad_token_id": 0}, folder)
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    if kind == "LasrForCTC":
        vocabulary = [(piece, -float(i)) for i, piece in enumerate(pieces)]
        transformers.LasrTokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
        transformers.LasrFeatureExtractor().save_pretrained(folder)
    else:
        letters = {letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *pieces[4:]])}
        (folder / "vocab.json").write_text(json.dumps(letters))
        transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()

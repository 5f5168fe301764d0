"""The student in loops that are not ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from small_whisper import small_student
from usmlite.movement import attach
from usmlite.student import compressed_layers


class Windows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "input_features": torch.randn(8, 3000, generator=generator),
            "labels": torch.tensor([263, 40, 50]),
        }


def test_the_transformers_trainer_trains_it(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    student, _ = small_student()
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    updater = attach(student, optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    settings = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    before = {name: layer.compression.mask.clone() for name, layer in compressed_layers(student)
              if layer.compression.mask is not None}  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=student, args=settings, train_dataset=Windows(), optimizers=(optimizer, schedule)
    )
    trainer.train()
    assert updater.steps == 4
    moved = [
        not torch.equal(student.get_submodule(name).compression.mask, mask) for name, mask in before.items()
    ]
    assert any(moved)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import json
import test_finetune as t
from usmlite.data import Utterance
speech = [Utterance(i, Path(p), d, x) for i, p, d, x in json.load(open({data!r}))]
student, outcome = t.run(speech, Path({output!r}), t.recipe(3, batch_size={batch}, checkpoint_every=1))
"""


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(tmp_path):
    import json

    import numpy as np
    import soundfile

    rows = []
    for number in range(8):
        samples = np.random.default_rng(number).normal(0, 0.1, 16000 * 20).astype(np.float32)
        soundfile.write(tmp_path / f"{number}.wav", samples, 16000)
        rows.append([str(number), str(tmp_path / f"{number}.wav"), 20.0, "good day"])
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    losses = {}
    for name, batch, launch in (
        ("one", 2, [sys.executable]),
        (
            "two",
            1,
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611"],
        ),
    ):
        output = tmp_path / name
        output.mkdir()
        script = tmp_path / f"{name}.py"
        script.write_text(
            SCRIPT.format(tests=str(Path(__file__).parent), data=str(data), output=str(output), batch=batch)
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run([*launch, str(script)], check=True, env=env, timeout=300)
        losses[name] = [json.loads(line)["kl"] for line in (output / "train.jsonl").read_text().splitlines()]
    assert len(losses["two"]) == len(losses["one"]) == 3
    state = [
        json.loads((tmp_path / n / "checkpoints" / "step-000003" / "state.json").read_text()) for n in losses
    ]
    assert state[0]["step"] == state[1]["step"] == 3
    from safetensors.torch import load_file

    one, two = (
        load_file(tmp_path / n / "checkpoints" / "step-000003" / "student.safetensors") for n in losses
    )
    weight = "model.decoder.layers.0.fc1.weight"
    assert torch.allclose(one[weight], two[weight], atol=2e-3)

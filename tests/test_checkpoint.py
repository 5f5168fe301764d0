import json
import os

import pytest
import torch

from small_whisper import small_student
from usmlite.checkpoint import CheckpointFolder, load_student, read_state, save_student, student_tensors
from usmlite.errors import OutputError, TrainingError


def trained(seed: int = 0):
    student, _ = small_student(seed=seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return student, optimizer


def test_student_and_optimizer_come_back_bit_for_bit(tmp_path):
    student, optimizer = trained()
    CheckpointFolder(tmp_path).save(student, optimizer, {"step": 7, "seconds": 1.5}, 7)
    other, _ = small_student(seed=5)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    assert CheckpointFolder(tmp_path).restore(other, fresh) == {"step": 7, "seconds": 1.5}
    for name, value in student_tensors(student).items():
        assert torch.equal(value, student_tensors(other)[name]), name
    ours = [optimizer.state[p] for p in student.parameters()]
    theirs = [fresh.state[p] for p in other.parameters()]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    # And both go on alike.
    for parameter, twin in zip(student.parameters(), other.parameters(), strict=True):
        parameter.grad = torch.ones_like(parameter)
        twin.grad = torch.ones_like(twin)
    optimizer.step()
    fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))


def test_only_the_newest_is_kept_and_half_written_ones_are_ignored(tmp_path):
    folder = CheckpointFolder(tmp_path)
    student, optimizer = trained()
    folder.save(student, optimizer, {"step": 1}, 1)
    (tmp_path / ".step-000002.99.tmp").mkdir()
    assert folder.newest().name == "step-000001"
    folder.save(student, optimizer, {"step": 3}, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
    assert CheckpointFolder(tmp_path / "none").newest() is None


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    student, optimizer = trained()
    folder.save(student, optimizer, {"step": 1}, 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        folder.save(student, optimizer, {"step": 2}, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert read_state(folder.newest())["step"] == 1


def test_saving_over_a_student_replaces_it_whole(tmp_path):
    student, _ = trained()
    save_student(tmp_path / "best", student, None, {"step": 1})
    save_student(tmp_path / "best", student, None, {"step": 2})
    assert read_state(tmp_path / "best") == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path):
    student, _ = trained()
    save_student(tmp_path / "best", student, None, {"step": 1})
    other, _ = small_student(d_model=32)
    with pytest.raises(TrainingError, match="does not fit this recipe"):
        load_student(tmp_path / "best", other)
    file = tmp_path / "best" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TrainingError, match="damaged checkpoint"):
        load_student(tmp_path / "best", student)
    (tmp_path / "best" / "state.json").write_text(json.dumps([1]))
    with pytest.raises(TrainingError, match="unreadable training state"):
        read_state(tmp_path / "best")

"""A run of two processes: that it is one run, that it survives the death of one of them, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from small_whisper import small_teacher

STEPS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    teacher, adapter = small_teacher()
    teacher.save_pretrained(folder)
    adapter.save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _speech(tmp_path_factory.mktemp("speech"), 8)


def _speech(folder: Path, count: int) -> Path:
    for number in range(count):
        samples = np.random.default_rng(number).normal(0, 0.1, 16000 * 20).astype(np.float32)
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        (folder / f"{number}.txt").write_text("good day")
    return folder


def _command(model: Path, speech: Path, output: Path, *flags: str) -> list[str]:
    given = {
        "data": speech, "out": output, "targets": "text", "calibration": 2, "steps": STEPS, "batch-size": 1,
        "precision": "float32", "checkpoint-every": 4, "bits": 4, "sparsity": "2:4",
    }  # fmt: skip
    named = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return ["usmlite", "compress", str(model), *named, *flags]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TERM": "dumb"}


def _start(processes: int, command: list[str]) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(launch if processes > 1 else []), "-m", *command],
        env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _run(processes: int, command: list[str]) -> tuple[int, str]:
    process = _start(processes, command)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def _log(run: Path) -> list[dict[str, float]]:
    path = run / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _rank(pid: int) -> str | None:
    """RANK of a process; None where it has none or is gone."""
    try:
        values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((value[5:].decode() for value in values if value.startswith(b"RANK=")), None)


def _workers(parent: int) -> dict[str, int]:
    """Ranks and numbers of the processes that torchrun has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ranks = {_rank(int(pid)): int(pid) for pid in children}
    return {rank: pid for rank, pid in ranks.items() if rank is not None}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_process_that_is_killed_ends_the_run_and_nothing_is_lost(model, speech, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, errors = _run(2, _command(model, speech, whole))
    assert code == 0, errors
    launcher = _start(2, _command(model, speech, cut))
    deadline = time.monotonic() + 200
    while len(_log(cut)) < 6:
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.02)
    workers = _workers(launcher.pid)
    assert set(workers) == {"0", "1"}
    os.kill(workers["1"], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode != 0
    assert "another process of this run is gone" in errors, errors
    assert "step-0000" in errors
    assert _rank(workers["0"]) is None  # nobody is left waiting
    assert len(_log(cut)) < STEPS
    assert not (cut / "packed").exists()
    code, errors = _run(2, _command(model, speech, cut))
    assert code == 0, errors
    one, two = _log(whole), _log(cut)
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-5)
    weights = [load_file(run / "packed" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_hears_each_window_once(model, speech, tmp_path):
    run = tmp_path / "run"
    launcher = _start(2, _command(model, speech, run))
    deadline = time.monotonic() + 200
    while len(_log(run)) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=100)
    newest = max((run / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    assert 6 <= state["step"] < STEPS
    assert state["windows"] == 2 * state["step"]
    code, errors = _run(1, _command(model, speech, run))
    assert code == 0, errors
    report = json.loads((run / "report.json").read_text())
    assert report["training"]["windows"] == 2 * state["step"] + (STEPS - state["step"])


@pytest.mark.slow
def test_processes_with_other_speech_are_refused(model, tmp_path):
    for rank, count in enumerate((8, 5)):
        (tmp_path / str(rank) / "speech").mkdir(parents=True)
        _speech(tmp_path / str(rank) / "speech", count)
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))\n"
        "from usmlite.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = _command(model, Path("speech"), tmp_path / "run")[1:]
    done = subprocess.run(
        [*launch, str(script), *command], env=_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "process 1: the processes of this run do not agree on the speech" in done.stderr
    assert "8 utterances" in done.stderr
    assert "5 utterances" in done.stderr
    assert not (tmp_path / "run" / "train.jsonl").exists()

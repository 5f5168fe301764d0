import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import nn

from small_whisper import small_student, small_teacher
from usmlite import finetune as loop
from usmlite.checkpoint import student_tensors
from usmlite.data import Utterance
from usmlite.errors import TrainingError
from usmlite.load import student_options
from usmlite.pack import pack_layer
from usmlite.recipe import Recipe, build_recipe
from usmlite.spec import CompressionSpec, LayerSpec, Rule
from usmlite.student import MASK_RULES, compressed_layers

TEXTS = ["hello", "good day", "a tree", "the sea", "no", "yes we go", "rain", "sun"]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    folder = tmp_path_factory.mktemp("speech")
    out = []
    for number, text in enumerate(TEXTS):
        samples = np.random.default_rng(number).normal(0, 0.1, 16000 * (3 + number)).astype(np.float32)
        path = folder / f"{number}.wav"
        soundfile.write(path, samples, 16000)
        out.append(Utterance(str(number), path, len(samples) / 16000, text))
    return out


MOVING = ("masks", "scales", "mask_freeze", "bits_schedule", "stochastic_bits", "stochastic_share")


def recipe(steps: int = 6, **settings: object) -> Recipe:
    student = {name: settings.pop(name) for name in MOVING if name in settings}
    training = {
        "steps": steps,
        "batch_size": 1,
        "precision": "float32",
        "checkpoint_every": 2,
        "eval_every": 3,
        "learning_rate": 3e-3,
        "embedding_learning_rate": 1e-3,
        **settings,
    }
    return build_recipe({"training": training, "student": {"mask_every": 1, **student}})


RATED = CompressionSpec.simple(2, first=[Rule("*.fc1", LayerSpec.at_rate(2.5))])


def run(
    speech, output: Path, plan: Recipe, *, spec: CompressionSpec | None = None, **options: object
) -> tuple[nn.Module, loop.Outcome]:
    teacher, adapter = small_teacher()
    student, _ = small_student(spec, options=student_options(plan))
    output.mkdir(exist_ok=True)
    outcome = loop.finetune(student, teacher, adapter, speech, plan, output, **options)  # type: ignore[arg-type]
    return student, outcome


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = student_tensors(a), student_tensors(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_loss_falls_and_everything_is_logged(speech, tmp_path):
    told: list[loop.Progress] = []
    _, outcome = run(speech, tmp_path, recipe(12), tell=told.append)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert np.mean([row["loss"] for row in rows[-3:]]) < np.mean([row["loss"] for row in rows[:3]])
    assert [now.step for now in told] == list(range(1, 13))
    assert outcome.steps == 12
    assert outcome.windows == 12
    assert any(row["churn"] > 0 for row in rows)
    assert rows[-1]["churn"] == rows[-2]["churn"]  # frozen for the last part


@pytest.mark.parametrize(
    "choice",
    [
        {"spec_augment": True, "average": 0.9, "layers": 1.0, "attention": 1.0},
        {"scales": "rand"},
        {"spec": RATED, "bits_schedule": "8,4,3", "average": 0.9},
        {"spec": RATED, "bits_schedule": "4", "stochastic_bits": "4,8", "scales": "min-error"},
        {"stochastic_bits": "6,8", "masks": "gumbel"},
        {"phases": [{"until": 0.4, "learning_rate": 1e-3, "layers": 1.0}, {"until": 0.8, "states": 0.0}]},
        *({"masks": masks} for masks in MASK_RULES),
    ],
)
def test_a_run_cut_off_anywhere_ends_like_one_that_was_not(speech, tmp_path, choice):
    choice, spec = dict(choice), choice.get("spec")
    choice.pop("spec", None)
    plan = recipe(6, accumulate=2, **choice)
    if "spec_augment" in choice:
        plan = replace(plan, data=replace(plan.data, swapped=0.3))
    whole, _ = run(speech, tmp_path / "whole", plan, spec=spec)

    class Killed(BaseException):
        pass

    def kill_at(step: int):
        def tell(now: loop.Progress) -> None:
            if now.step == step:
                raise Killed

        return tell

    for step in (1, 3, 5):  # before, between and after checkpoints
        with pytest.raises(Killed):
            run(speech, tmp_path / "cut", plan, spec=spec, tell=kill_at(step))
    resumed, _ = run(speech, tmp_path / "cut", plan, spec=spec)
    assert same(whole, resumed)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / name / "train.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_the_embedding_learns_at_its_own_rate(speech, tmp_path, rate):
    start, _ = small_student()
    student, _ = run(speech, tmp_path, recipe(3, embedding_learning_rate=rate))
    moved = {
        name: not torch.equal(value, student_tensors(start)[name])
        for name, value in student_tensors(student).items()
    }
    assert moved["model.decoder.embed_tokens.weight"] == (rate > 0)
    assert moved["model.decoder.layers.0.fc1.weight"]


def test_the_best_student_by_dev_wer_is_kept(speech, tmp_path):
    wers = iter([0.6, 0.5, 0.2, 0.4, 0.9])  # before the first step, and after every third
    _, outcome = run(speech, tmp_path, recipe(12), dev_wer=lambda student: next(wers))
    assert (outcome.best_step, outcome.best_wer) == (6, 0.2)
    assert json.loads((tmp_path / "best" / "state.json").read_text()) == {"step": 6, "dev_wer": 0.2}


def test_a_start_that_training_does_not_better_is_kept(speech, tmp_path):
    start, _ = small_student()
    student, outcome = run(
        speech, tmp_path, recipe(3), dev_wer=lambda student: 0.1 if same(student, start) else 0.2
    )
    assert (outcome.best_step, outcome.best_wer) == (0, 0.1)
    assert not same(student, start)
    saved = load_file(tmp_path / "best" / "student.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in student_tensors(start).items())


def test_learned_masks_have_a_rate_of_their_own(speech, tmp_path):
    plan = recipe(8, masks="gumbel", mask_learning_rate=0.5)
    student, _ = small_student(options=student_options(plan))
    before = student_tensors(student)
    groups = loop.make_optimizer(student, plan).param_groups
    logits = {id(p) for name, p in student.named_parameters() if name.endswith("patterns.logits")}
    assert [
        {id(p) for p in group["params"]} for group in groups if group["rate"] == "mask_learning_rate"
    ] == [logits]
    after = student_tensors(run(speech, tmp_path, plan)[0])
    assert not torch.equal(
        before["model.decoder.layers.0.fc1.compression.mask"],
        after["model.decoder.layers.0.fc1.compression.mask"],
    )


def test_a_student_that_is_not_yet_sparse_is_not_the_best(speech, tmp_path):
    wers = iter([0.05, 0.1, 0.4, 0.3, 0.35])  # 2:4 from step 6 of 12 on
    student, outcome = run(speech, tmp_path, recipe(12, masks="gradual"), dev_wer=lambda student: next(wers))
    assert (outcome.best_step, outcome.best_wer) == (9, 0.3)
    for name, layer in compressed_layers(student):
        pack_layer(name, layer)


def test_a_student_with_more_bits_than_its_spec_is_not_the_best(speech, tmp_path):
    wers = iter([0.05, 0.1, 0.4, 0.3, 0.35])  # two bits from step 6 of 12 on
    plan = recipe(12, bits_schedule="8", mask_freeze=0.9)
    student, outcome = run(speech, tmp_path, plan, spec=RATED, dev_wer=lambda student: next(wers))
    assert (outcome.best_step, outcome.best_wer) == (9, 0.3)
    for name, layer in compressed_layers(student):
        assert layer.compression.present == layer.compression.spec
        pack_layer(name, layer)


def test_phases_set_rates_and_losses(speech, tmp_path, monkeypatch):
    weighed: list[float] = []
    plain = loop.Distillation.forward

    def watched(self, *args, **kwargs):
        weighed.append(self.weights.layers)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(loop.Distillation, "forward", watched)
    phases = [{"until": 0.5, "learning_rate": 3e-2, "layers": 2.0, "embedding_learning_rate": 1e-3}]
    plan = recipe(6, phases=phases, warmup=0.0, final_rate=1.0, embedding_learning_rate=0.0)
    student, _ = run(speech, tmp_path, plan)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [3e-2] * 3 + [3e-3] * 3
    assert weighed == [2.0] * 3 + [0.0] * 3
    assert ["layers" in row for row in rows] == [True] * 3 + [False] * 3
    start, _ = small_student()
    assert not torch.equal(student.model.decoder.embed_tokens.weight, start.model.decoder.embed_tokens.weight)


def test_without_dev_the_last_student_is_the_best(speech, tmp_path):
    student, outcome = run(speech, tmp_path, recipe(3))
    assert outcome.best_step == 3
    saved = load_file(tmp_path / "best" / "student.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in student_tensors(student).items())


def test_nan_stops_names_the_step_and_keeps_the_checkpoint(speech, tmp_path, monkeypatch):
    from usmlite.distill import Distillation

    plain, calls = Distillation.forward, []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        out = plain(self, *args, **kwargs)
        if len(calls) == 4:
            out["loss"] = out["loss"] * float("nan")
        return out

    monkeypatch.setattr(Distillation, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"step 4.*not finite") as caught:
        run(speech, tmp_path, recipe(6))
    assert "step-000002" in str(caught.value)
    assert (tmp_path / "checkpoints" / "step-000002").is_dir()


def test_ctrl_c_finishes_the_step_and_saves(speech, tmp_path):
    def tell(now: loop.Progress) -> None:
        if now.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(speech, tmp_path / "cut", recipe(4, checkpoint_every=100), tell=tell)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000002"]
    resumed, _ = run(speech, tmp_path / "cut", recipe(4, checkpoint_every=100))
    whole, _ = run(speech, tmp_path / "whole", recipe(4, checkpoint_every=100))
    assert same(whole, resumed)


def test_speech_is_changed_anew_in_every_epoch_and_the_same_again(speech):
    plan = build_recipe({
        "training": {"steps": 50, "batch_size": 1},
        "data": {"speed": 0.1, "noise": 0.5, "level": 6.0, "single": 1.0},
    })  # fmt: skip
    one, two, plain = (loop.TrainingWindows(speech, p) for p in (plan, plan, recipe(50)))
    lengths: dict[str, set[float]] = {}
    for index in range(3 * len(speech)):
        assert torch.equal(one[index][0], two[index][0])
        (utterance,) = one.window(index).utterances
        lengths.setdefault(utterance.id, set()).add(utterance.duration)
        original = next(u for u in speech if u.id == utterance.id)
        assert utterance.duration == pytest.approx(original.duration / utterance.speed)
        assert 0.9 <= utterance.speed <= 1.1
        assert one[index][1][0].end == utterance.duration
    assert all(len(found) == 3 for found in lengths.values())
    assert not torch.equal(one[0][0], plain[0][0])


def test_speech_that_would_not_fit_keeps_its_speed():
    full = Utterance("a", Path("a.wav"), 29.9, "a")
    speeds = [loop.at_random_speeds([full], 0.1, str(seed))[0].speed for seed in range(20)]
    assert min(speeds) == 1.0
    assert max(speeds) > 1.0


@pytest.mark.parametrize("hears", ["same", "clean"])
def test_the_teacher_hears_what_the_recipe_says(speech, tmp_path, monkeypatch, hears):
    heard: list[torch.Tensor] = []
    teacher, adapter = small_teacher()
    teacher.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(kwargs.get("input_features", args[0] if args else None)),
        with_kwargs=True,
    )
    masked: list[torch.Tensor] = []
    augment = loop.spec_augment
    monkeypatch.setattr(loop, "spec_augment", lambda *a: masked.append(augment(*a)) or masked[-1])
    plan = recipe(1, spec_augment=True, teacher_hears=hears)
    student, _ = small_student()
    loop.finetune(student, teacher, adapter, speech, plan, tmp_path)
    assert torch.equal(heard[0], masked[0]) == (hears == "same")


def test_windows_cover_every_utterance_each_epoch(speech):
    dataset = loop.TrainingWindows(speech, recipe(100))
    index, seen = 0, []
    while len(seen) < 2 * len(speech):
        seen += [u.id for u in dataset.window(index).utterances]
        index += 1
    assert sorted(seen[: len(speech)]) == sorted(u.id for u in speech)
    assert sorted(seen[len(speech) :]) == sorted(u.id for u in speech)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_finetune as t
from usmlite.data import Utterance
import json
speech = [Utterance(i, Path(p), d, x) for i, p, d, x in json.load(open({data!r}))]
t.run(speech, Path({output!r}), t.recipe(400, checkpoint_every=1))
"""


def test_kill_minus_nine_at_any_moment_leaves_a_run_that_resumes(speech, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([(u.id, str(u.audio), u.duration, u.text) for u in speech]))
    output = tmp_path / "run"
    script = KILLED.format(tests=str(Path(__file__).parent), data=str(data), output=str(output))
    child = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not (output / "checkpoints").is_dir() and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.05)
        time.sleep(1.0)
    finally:
        child.kill()
        child.wait()
    from usmlite.checkpoint import CheckpointFolder, read_state

    newest = CheckpointFolder(output / "checkpoints").newest()
    assert newest is not None
    done = read_state(newest)["step"]
    torch.set_num_threads(1)
    plan = recipe(done + 1, checkpoint_every=1)
    # The rate depends on the length of the run, so the twin runs as long as the killed one was to run.
    assert done >= 1
    _, outcome = run(speech, output, plan)
    assert outcome.steps == done + 1

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import usmlite
from usmlite import cli
from usmlite.cli import recipe_flags
from usmlite.recipe import Recipe, keys

HEAVY = (
    "torch", "numpy", "transformers", "accelerate", "soundfile", "jiwer", "rich", "safetensors", "altair",
    "jinja2",
)  # fmt: skip
COMMANDS = (
    "compress", "ctc", "sweep", "report", "evaluate", "transcribe", "serve", "info", "plan", "export", "demo",
)  # fmt: skip


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "usmlite"]), *arguments]
    source = str(Path(usmlite.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONWARNINGS": "error", "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail for the user's sake; returns its one line."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usmlite: error: ")
    assert err.count("\n") == 1
    return err


# Help


def test_help_is_light_and_quick() -> None:
    code = (
        "import sys\nfrom usmlite.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as done: assert done.code == 0\n"
        f"print('loaded:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(code=code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
    # Processor time: the wall clock of a busy machine says nothing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: usmlite {command}" in shown
    assert "examples:" in shown or "results/" in shown
    assert "None" not in shown


def test_help_of_compress_has_every_recipe_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compress", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for key in keys():
        assert f"--{key.flag}" in shown
    for section in ("model", "data", "spec", "student", "training"):
        assert f"[{section}]" in shown
    for key in keys():
        if key.default is not None and key.name != "source":
            assert f"(default: {recipe_flags.shown(key.default)})" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_parse(command: str) -> None:
    parser = cli.build_parser()
    epilog = getattr(cli, command).EPILOG + cli.MAIN_EPILOG
    lines = [line.strip().split("   ")[0] for line in epilog.splitlines() if line.startswith("  usmlite ")]
    assert lines
    for line in lines:
        parser.parse_args(line.split()[1:])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"usmlite {usmlite.__version__}\n"


def test_without_a_command_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "the usual way through" in err


def test_python_m_usmlite() -> None:
    assert run("--version").stdout == f"usmlite {usmlite.__version__}\n"


# Recipes and flags


def compressed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Recipe, Path]:
    """The recipe and the directory that `usmlite compress` goes to work with."""
    calls: list[tuple[Recipe, Path]] = []

    def record(recipe: Recipe, output: Path, *, console: Any = None) -> dict[str, Any]:
        calls.append((recipe, output))
        return {}

    monkeypatch.setattr(importlib.import_module("usmlite.compress"), "compress", record)
    assert cli.main(["compress", *arguments]) == 0
    return calls[0]


SAMPLES: dict[type, tuple[str, object]] = {int: ("3", 3), float: ("0.25", 0.25), str: ("some", "some")}


@pytest.mark.parametrize("key", list(keys()), ids=lambda key: key.flag)
def test_every_key_is_a_flag(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if key.kind is bool:
        value: object = not key.default
        words = [f"--{'' if value else 'no-'}{key.flag}"]
    else:
        text, value = SAMPLES[key.kind]
        if key.name == "grid":
            text = value = "midrise"  # ternary asks for 2 bits
        elif key.choices:
            text = value = key.choices[-1]
        elif key.name == "sparsity":
            text = value = "1:4"
        elif key.name in ("bits_schedule", "stochastic_bits"):
            text = value = "8, 6"
        elif key.name == "scale_bits":
            text, value = "8", 8
        elif key.name == "target_size":
            text = value = "9.4%"
        words = [f"--{key.flag}", text]
        if key.name == "allocation":  # of what there is to choose
            words += ["--target-size", "9.4%"]
    recipe, _ = compressed(monkeypatch, *words, "--out", "there")
    assert getattr(getattr(recipe, key.section), key.name) == value
    assert type(getattr(getattr(recipe, key.section), key.name)) is type(value)


def test_flags_win_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[model]\nsource = "base"\n[spec]\nbits = 8\nsparsity = "dense"\n'
        '[[spec.rules]]\nmatch = "*.fc1"\nbits = 3\n[training]\nsteps = 7\nseed = 5\n'
    )
    recipe, output = compressed(
        monkeypatch, "--recipe", str(file), "--steps", "9", "--bits", "float", "--out", "there"
    )
    assert (recipe.model.source, recipe.training.steps, recipe.training.seed) == ("base", 9, 5)
    assert recipe.spec.bits == "float"
    assert recipe.spec.rules == ({"match": "*.fc1", "bits": 3},)
    assert output == Path("there")


@pytest.mark.parametrize(
    "words",
    [["base", "--steps", "2"], ["--steps", "2", "base"], ["--model", "base"], ["base", "--model", "base"]],
)
def test_model_may_stand_anywhere(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = compressed(monkeypatch, *words, "--out", "there")
    assert recipe.model.source == "base"


def test_no_finetune_is_zero_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = compressed(monkeypatch, "--no-finetune", "--out", "there")
    assert recipe.training.steps == 0


# Errors


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["info", "tiny.en", "--bits", "0"], ["bits", "1 to 8", "found 0"]),
        (["info", "tiny.en", "--bits", "four"], ["--bits", "a whole number, or 'float'", "'four'"]),
        (["info", "tiny.en", "--sparsity", "3:2"], ["sparsity", "N < M", "found 3:2"]),
        (["info", "tiny.en", "--sparsity", "half"], ["sparsity", "2:4", "'half'"]),
        (["info", "tiny.en", "--target-size", "9.4%"], ["spec.target_size", "usmlite compress"]),
        (["info", "tiny.en", "--bitz", "4"], ["--bitz", "Did you mean '--bits'?"]),
        (["compress", "--out", "x", "--steps", "-1"], ["training.steps", "at least 0", "found -1"]),
        (["compress", "--out", "x", "--steps", "many"], ["--steps", "a whole number", "'many'"]),
        (["compress", "--out", "x", "--warmup", "2"], ["training.warmup", "0 to 1", "found 2"]),
        (["compress", "--out", "x", "--clip", "nan"], ["training.clip", "at least 0"]),
        (["compress", "--out", "x", "--start", "hesian"], ["student.start", "Did you mean 'hessian'?"]),
        (
            ["compress", "--out", "x", "--no-finetune", "--steps", "3"],
            ["--no-finetune", "training.steps = 3"],
        ),
        (["compress", "base", "--out", "x", "--model", "tiny.en"], ["MODEL", "'tiny.en'"]),
        (["compress", "base"], ["--out", "--help"]),
        (["compress", "--out", "x", "--recipe", "nowhere.toml"], ["nowhere.toml", "cannot read"]),
        (["compress", "--out", "x", "--recipe", "{grid}"], ["[grid]", "usmlite sweep"]),
        (["sweep", "a.toml"], ["RECIPE and --out are required", "--table"]),
        (["sweep", "--out", "x"], ["RECIPE and --out are required"]),
        (["sweep", "--table", "x", "--steps", "3"], ["--table", "alone"]),
        (["sweep", "--table", "nowhere"], ["nowhere", "there is no run"]),
        (["sweep", "nowhere.toml", "--out", "x"], ["nowhere.toml", "cannot read"]),
        (["sweep", "{grid}", "--out", "x", "--warmup", "2"], ["command line: training.warmup"]),
        (["sweep", "{grid}", "--out", "x"], ["grid.toml: [grid]: spec.bitz", "Did you mean 'spec.bits'?"]),
        (["evaluate", "tiny.en"], ["--data"]),
        (["evaluate", "tiny.en", "--data", "nowhere"], ["nowhere", "no such file"]),
        (["evaluate", "tiny.en", "--data", "d", "--worst", "-3"], ["--worst", "'-3'"]),
        (["evaluate", "tiny.en", "--data", "d", "--json", "no/where.json"], ["no/where.json", "mkdir -p no"]),
        (["transcribe", "tiny.en", "a.wav", "--format", "all"], ["--format all", "--output-dir"]),
        (["transcribe", "tiny.en", "a.wav", "--format", "doc"], ["--format", "'doc'"]),
        (["info", "no/such/model"], ["no/such/model", "Supported are"]),
        (["fly"], ["fly"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in (*COMMANDS, "fly") else "",
)
def test_wrong_input_is_one_line(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    grid = tmp_path_factory.mktemp("recipes") / "grid.toml"
    grid.write_text('[grid]\n"spec.bitz" = [4, 8]\n')
    error = fails(capsys, *(str(grid) if word == "{grid}" else word for word in words))
    for part in parts:
        assert part in error
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_flag_is_not_put_down_to_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[training]\nsteps = 5\n")
    assert "recipe.toml" not in fails(
        capsys, "compress", "--recipe", str(file), "--out", "x", "--warmup", "3"
    )
    file.write_text("[training]\nstepz = 5\n")
    assert "recipe.toml: training.stepz: unknown key. Did you mean 'steps'?" in fails(
        capsys, "compress", "--recipe", str(file), "--out", "x"
    )


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli.info, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info", "tiny.en"])


@pytest.mark.parametrize(
    ("command", "told"),
    [("compress", "goes on from there"), ("sweep", "goes on from there"), ("info", "interrupted")],
)
def test_ctrl_c(
    command: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(getattr(cli, command), "run", stopped)
    words = [command, "tiny.en", *(["--out", "x"] if command == "compress" else [])]
    assert cli.main(words) == 130
    assert told in capsys.readouterr().err


def test_a_reader_who_leaves_early_is_no_error() -> None:
    code = (
        "import sys\nfrom usmlite import cli\n"
        "def talk(arguments):\n    for _ in range(100000): print('x' * 100)\n    return 0\n"
        "cli.info.run = talk\nsys.exit(cli.main(['info', 'tiny.en']))"
    )
    source = str(Path(usmlite.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


# The commands at work, with a model too small to know any English


def test_transcribe_prints(packed_model: Path, recordings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["transcribe", str(packed_model), str(recordings / "0.wav"), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["duration"] == pytest.approx(0.5)
    assert err == ""


def test_transcribe_goes_on_past_bad_files(
    packed_model: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = tmp_path / "bad.wav", tmp_path / "out"
    bad.write_bytes(b"this is no audio")
    files = [recordings / "0.wav", bad, tmp_path / "missing.wav", recordings / "1.wav", recordings / "2.wav"]
    words = ["transcribe", str(packed_model), *map(str, files), "--format", "all", "--output-dir", str(out)]
    assert cli.main([*words, "--batch-size", "2"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 3
    assert "bad.wav" in lines[0]
    assert "missing.wav" in lines[1]
    assert "2 of 5 files" in lines[2]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{number}.{ending}" for number in range(3) for ending in ("txt", "json", "srt", "vtt", "tsv")
    )


def test_transcribe_refuses_to_write_two_over_each_other(
    packed_model: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "0.flac"
    error = fails(
        capsys, "transcribe", str(packed_model), str(recordings / "0.wav"), str(twin),
        "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert "share one transcript" in error
    assert not (tmp_path / "out").exists()


def test_evaluate(
    packed_model: Path,
    dense_model: Path,
    recordings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = tmp_path / "dense.json", tmp_path / "both.json"
    data = str(recordings / "manifest.jsonl")
    assert cli.main(["evaluate", str(dense_model), "--data", data, "--json", str(first), "--limit", "3"]) == 0
    words = ["evaluate", str(packed_model), "--data", data, "--limit", "3", "--worst", "2"]
    assert cli.main([*words, "--against", str(first), "--json", str(second)]) == 0
    shown = capsys.readouterr().out
    assert "words substituted" in shown
    assert "REF:" in shown
    dense, both = (json.loads(path.read_text()) for path in (first, second))
    assert dense["utterance_count"] == both["utterance_count"] == 3
    assert both["comparison"]["baseline_wer"] == dense["wer"]
    assert both["against"]["name"] == str(dense_model)
    assert both["weights_bytes"] == (packed_model / "model.safetensors").stat().st_size
    assert cli.main([*words, "--against", str(dense_model)]) == 0
    error = fails(capsys, *words[:-2], "--limit", "2", "--against", str(first)) if capsys.readouterr() else ""
    assert "not evaluated on the same utterances" in error


def test_info(
    packed_model: Path, dense_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", str(packed_model), "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert packed["file_bytes"] == (packed_model / "model.safetensors").stat().st_size
    rules = tmp_path / "recipe.toml"
    rules.write_text("[spec]\nbits = 4\nsparsity = '2:4'\n")
    assert cli.main(["info", str(dense_model), "--rules-from", str(rules)]) == 0
    assert "would take" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "model", "files"),
    [
        (["a.wav"], "tiny.en-small", ["a.wav"]),
        (["a.wav", "b.flac"], "tiny.en-small", ["a.wav", "b.flac"]),
        (["small", "a.wav"], "small", ["a.wav"]),
        (["tiny.en", "a.wav", "b.wav"], "tiny.en", ["a.wav", "b.wav"]),
        (["small", "--format", "srt", "a.wav"], "small", ["a.wav"]),
        (["a.wav", "--hold", "int8", "b.wav", "c.mp3"], "tiny.en-small", ["a.wav", "b.wav", "c.mp3"]),
        (["--model", "small", "a.wav"], "small", ["a.wav"]),
        (["recording.aiff", "--model", "small"], "small", ["recording.aiff"]),
    ],
)
def test_the_first_recording_is_not_taken_for_the_model(
    words: list[str], model: str, files: list[str]
) -> None:
    arguments, rest = cli.build_parser().parse_known_args(["transcribe", *words])
    assert cli.transcribe.sort_out(arguments, rest) == []
    assert arguments.source == model
    assert arguments.files == [Path(name) for name in files]


def test_transcribe_needs_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "transcribe", "tiny.en")
    assert "no audio file is named" in message
    assert "tiny.en" in message
    assert "--formt" in fails(capsys, "transcribe", "tiny.en", "a.wav", "--formt")

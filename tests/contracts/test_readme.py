"""What the README tells people to type works as it stands."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

import usmlite
from usmlite import cli
from usmlite.grid import expand

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# These finish in seconds with the small models of the tests; the others are parsed.
QUICK = ("evaluate", "transcribe", "info", "export")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def usmlite_words(line: str) -> list[str] | None:
    """The arguments of a usmlite command, however it is started."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["usmlite"]:
        return words[1:]
    if words[:4] == ["accelerate", "launch", "-m", "usmlite"]:
        return words[4:]
    return None


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed_model: Path, dense_model: Path, recordings: Path
) -> Path:
    """A folder with what the README's lines speak of."""
    shutil.copytree(packed_model, tmp_path / "small/packed")
    shutil.copytree(dense_model, tmp_path / "my-whisper")
    shutil.copytree(recordings, tmp_path / "speech")
    for number in range(4):
        shutil.copy(recordings / f"{number}.wav", tmp_path)
    shutil.copy(recordings / "0.wav", tmp_path / "interview.wav")
    for name in ("train", "dev", "test"):
        shutil.copy(recordings / "manifest.jsonl", tmp_path / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_check() -> None:
    assert len(shell_lines()) >= 8
    assert len(blocks("python")) >= 3


def test_set_up_is_two_commands() -> None:
    section = README.split("## Set-up")[1].split("\n## ")[0]
    assert re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE) == ["make demo\nmake test\n"]


@pytest.mark.parametrize("line", shell_lines())
def test_shell_lines_are_real(line: str) -> None:
    words = shlex.split(line, comments=True)
    arguments = usmlite_words(line)
    if arguments is not None:
        parsed = cli.build_parser().parse_args(arguments)
        if parsed.command in ("compress", "info"):
            cli.recipe_from(parsed, None)
        elif parsed.command == "sweep":
            assert parsed.table or expand([ROOT / path for path in parsed.recipes])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        runpy.run_path(str(ROOT / words[1]))["build_parser"]().parse_args(words[2:])
    else:
        pytest.fail(f"no test knows how to check: {line}")


@pytest.mark.parametrize(
    "line",
    [line for line in shell_lines() if (usmlite_words(line) or [""])[0] in QUICK and "--mic" not in line],
)
def test_quick_shell_lines_run(line: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = usmlite_words(line)
    assert words is not None
    # The real tiny.en transcribes for longer than a test may take.
    words = ["my-whisper" if word == "tiny.en" else word for word in words]
    assert cli.main(words) == 0, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*unauthenticated requests.*")
@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_python_snippets_run(code: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("text", blocks("toml"), ids=range(len(blocks("toml"))))
def test_recipes_load(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    for run in expand([tmp_path / "recipe.toml"]):
        assert len(run.recipe.spec.build().rules) > 3


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    runs = expand([path])
    # Their first lines say how to run them.
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# usmlite "):
            parsed = cli.build_parser().parse_args(shlex.split(line[2:])[1:])
            there = parsed.recipes if parsed.command == "sweep" else [parsed.recipe]
            assert there == [path.relative_to(ROOT)]
    assert all(run.recipe.model.source for run in runs)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_results_have_their_markers() -> None:
    assert README.count("<!-- results -->") == README.count("<!-- /results -->") == 1


def test_results_are_those_of_the_table() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks/librispeech.py"))["table"]()
    assert README.split("<!-- results -->")[1].split("<!-- /results -->")[0].strip() == table


def test_the_figures_of_the_native_kernels_are_those_measured() -> None:
    page = runpy.run_path(str(ROOT / "benchmarks/native.py"))["page"]
    measured = json.loads((ROOT / "results/native.json").read_text(encoding="utf-8"))
    shown = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert shown.split("<!-- native -->")[1].split("<!-- /native -->")[0].strip() == page(measured)


def test_public_names_exist() -> None:
    for name in usmlite.__all__:
        assert getattr(usmlite, name).__module__.startswith("usmlite."), name
    # The modules of the same names must not hide the functions.
    importlib.import_module("usmlite.evaluate")
    assert callable(usmlite.evaluate)
    assert callable(usmlite.load)
    assert callable(usmlite.compress)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = usmlite.nothing

"""What the README and the other pages tell people to type works as it stands."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import usmlite
from small_ctc import save_model
from usmlite import cli
from usmlite.cli.recipe_flags import recipe_from
from usmlite.grid import expand
from usmlite.recipe import DENSE_CTC
from usmlite.shipped import DEFAULT, shipped

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
}
README = PAGES["README.md"]
WITH_THE_SHIPPED_MODEL = "usmlite transcribe interview.wav"
# These finish in seconds with the small models of the tests; the others are parsed.
PEERS = {"faster-whisper", "pywhispercpp"}  # what benchmarks compare with, for which there is no extra
ARPA = """\\data\\
ngram 1=3
ngram 2=1

\\1-grams:
-2\t<unk>\t0
-2\t<s>\t0
-1\t</s>\t0

\\2-grams:
-1\t<s> </s>

\\end\\
"""
QUICK = ("evaluate", "transcribe", "info", "export")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks(language: str, *, without: tuple[str, ...] = ()) -> list[Block]:
    found = {
        page: re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for page, text in PAGES.items()
        if page not in without
    }
    return [Block(page, i, text) for page, texts in found.items() for i, text in enumerate(texts)]


def shell_lines() -> list[str]:
    """Every line once, on however many pages it stands."""
    joined = [re.sub(r"\\\n *", "", block.text) for block in blocks("sh")]
    lines = [line.strip() for text in joined for line in text.splitlines() if line.strip()]
    return list(dict.fromkeys(lines))


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
    save_model(tmp_path / "ctc-tiny", "WhisperForCTC")
    (tmp_path / "words.arpa").write_text(ARPA)
    for name in ("speech", "LIBRISPEECH/train"):
        shutil.copytree(recordings, tmp_path / name)
    for number in range(4):
        shutil.copy(recordings / f"{number}.wav", tmp_path)
    shutil.copy(recordings / "0.wav", tmp_path / "interview.wav")
    for name in ("train", "dev", "test"):
        shutil.copy(recordings / "manifest.jsonl", tmp_path / f"{name}.jsonl")
    for module in ("load", "info"):
        # It transcribes hums for longer than a test may take, where there is no native library.
        home = importlib.import_module(f"usmlite.{module}")
        monkeypatch.setattr(home, "shipped", {DEFAULT: packed_model}.get)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_check() -> None:
    assert len(shell_lines()) >= 8
    assert len(blocks("python")) >= 6
    assert {block.page for block in blocks("sh")} > {"README.md", "docs/get-started.md", "docs/your-data.md"}


def test_set_up_is_two_commands() -> None:
    section = README.split("## Set-up")[1].split("\n## ")[0]
    assert re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE) == ["make demo\nmake test\n"]


@pytest.mark.parametrize("line", shell_lines())
def test_shell_lines_are_real(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    arguments = usmlite_words(line)
    if arguments is not None:
        parsed = cli.build_parser().parse_args(arguments)
        if parsed.command == "ctc":
            recipe_from(parsed, None, DENSE_CTC)
        elif parsed.command in ("compress", "info"):
            recipe = getattr(parsed, "recipe", None)
            shipped = recipe is not None and recipe.parts[0] == "recipes"
            recipe_from(parsed, ROOT / recipe if shipped else None)
        elif parsed.command == "sweep":
            assert parsed.table or expand([ROOT / path for path in parsed.recipes])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "docker":
        assert (ROOT / "Dockerfile").is_file()
        told = words[words.index("usmlite") + 1 :]
        if words[1] == "run" and told:
            cli.build_parser().parse_args(told)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / path).is_file() for path in words[3:])
    elif words[:2] == ["pip", "install"] and words[2] in PEERS:
        assert set(words[2:]) <= PEERS
    elif words[:2] == ["pip", "install"]:
        extras = re.fullmatch(r"\.(?:\[([a-z,]+)\])?", words[2])
        assert extras is not None
        assert {*(extras[1] or "dev").split(",")} <= optional_dependencies().keys()
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(ParsedError):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    elif words != [".venv/bin/pre-commit", "install"]:
        pytest.fail(f"no test knows how to check: {line}")


class ParsedError(Exception):
    """A script has understood its arguments."""


def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> None:
    _, rest = self.parse_known_args(*given)
    assert not rest
    raise ParsedError


def optional_dependencies() -> dict[str, list[str]]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found


@pytest.mark.parametrize(
    "line",
    [line for line in shell_lines() if (usmlite_words(line) or [""])[0] in QUICK and "--mic" not in line],
)
def test_quick_shell_lines_run(
    line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = usmlite_words(line)
    assert words is not None
    if line == WITH_THE_SHIPPED_MODEL:
        monkeypatch.setattr(importlib.import_module("usmlite.load"), "shipped", shipped)
    # The real tiny.en transcribes for longer than a test may take.
    words = ["my-whisper" if word == "tiny.en" else word for word in words]
    assert cli.main(words) == 0, capsys.readouterr().err


# The guide's example is run where there is the model that it speaks of: tests/models/test_families.py.
@pytest.mark.filterwarnings("ignore:.*unauthenticated requests.*")
@pytest.mark.parametrize("block", blocks("python", without=("docs/adding-a-model.md",)), ids=str)
def test_python_snippets_run(block: Block, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block.text, block.page, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_recipes_load(block: Block, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(block.text)
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


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    assert json.loads(block.text)


def flags() -> Iterator[str]:
    """The flags that pages speak of in running text and in tables."""
    for page, text in PAGES.items():
        # Decisions may speak of flags that are gone, and of other tools'.
        if not page.startswith("docs/decisions/"):
            prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
            for code in re.findall(r"`((?:usmlite |--)[^`\n]*)`", prose):
                yield from re.findall(r"(?<!\S)--[a-z][a-z-]*", code)


def test_flags_exist() -> None:
    # Those of the benchmarks are parsed with their lines; `docker stop` has --time.
    known = {"--parts", "--time"}
    parser = cli.build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    actions = [action for command in commands.values() for action in command._actions]
    known |= {option for action in actions for option in action.option_strings}
    found = set(flags())
    assert len(found) > 20
    assert found <= known


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_results_have_their_markers() -> None:
    assert README.count("<!-- results -->") == README.count("<!-- /results -->") == 1


def test_results_are_those_of_the_table() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks/librispeech.py"))["table"]()
    assert README.split("<!-- results -->")[1].split("<!-- /results -->")[0].strip() == table


def test_the_results_of_ctc_models_are_those_measured() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks/ctc.py"))["table"]()
    page = PAGES["docs/ctc.md"]
    assert page.split("<!-- results -->")[1].split("<!-- /results -->")[0].strip() == table


def test_the_figures_of_the_native_kernels_are_those_measured() -> None:
    page = runpy.run_path(str(ROOT / "benchmarks/native.py"))["page"]
    measured = json.loads((ROOT / "results/native.json").read_text(encoding="utf-8"))
    shown = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert shown.split("<!-- native -->")[1].split("<!-- /native -->")[0].strip() == page(measured)


def test_the_figure_of_roundings_is_what_was_measured() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/rounding.py"))
    measured = json.loads((ROOT / "results/rounding.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/figures/rounding.svg").read_bytes() == script["drawn"](measured)


def test_public_names_are_documented() -> None:
    named = re.findall(r"^\.\. auto\w+:: usmlite\.(\w+)$", PAGES["docs/reference/python.md"], re.MULTILINE)
    assert sorted(named) == sorted(usmlite.__all__)


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

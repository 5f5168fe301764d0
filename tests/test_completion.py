"""What shells complete, asked of a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from usmlite import cli
from usmlite.cli.completion import SHELLS


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "usmlite.bash"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        assert cli.main(["completion", "bash"]) == 0
    path.write_text("".join(printed), encoding="utf-8")
    return path


def completed(script: Path, words: list[str], folder: Path) -> list[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    code = (
        f'source "{script}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_usmlite 2>/dev/null; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run([bash, "-c", code, "bash", *words], cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    return [word for word in done.stdout.splitlines() if word]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["usmlite", "tran"], ["transcribe"]),
        (["usmlite", "transcribe", "--beam"], ["--beam-size"]),
        (["usmlite", "export", "--to", "ctr"], ["ctranslate2"]),
        (["usmlite", "compress", "--recipe", "inter"], ["interview.wav"]),
        (["usmlite", "compress", "--data", "inter"], ["interview.wav"]),
        (["usmlite", "evaluate", "spe"], ["speech"]),
        (["usmlite", "compress", "--out", "i"], []),
        (["usmlite", "compress", "--out", "s"], ["speech"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bash_completes(script: Path, tmp_path: Path, words: list[str], expected: list[str]) -> None:
    (tmp_path / "interview.wav").touch()
    (tmp_path / "speech").mkdir()
    assert completed(script, words, tmp_path) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for command in ("compress", "transcribe", "completion", "word-timestamps"):
        assert command in text


def test_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "cmd"]) == 2
    error = capsys.readouterr().err
    assert "'cmd'" in error
    assert "bash" in error

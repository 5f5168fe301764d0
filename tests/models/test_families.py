"""The guide's example works as it stands, and nothing above the adapters asks for a family."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from small_ctc import CONFIGS, LETTERS, save_model
from usmlite.errors import ModelError
from usmlite.models import Adapter, adapter_class, families, load_teacher, register

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / families.GUIDE).read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE))
def test_the_guides_example_runs(
    code: str,
    recordings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(CONFIGS, "UniSpeechSatForCTC", CONFIGS["Wav2Vec2ForCTC"])
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    save_model(tmp_path / "my-unispeech-sat", "UniSpeechSatForCTC")
    shutil.copytree(recordings, tmp_path, dirs_exist_ok=True)
    for name in ("train", "test"):
        shutil.copy(recordings / "manifest.jsonl", tmp_path / f"{name}.jsonl")
    shutil.copy(recordings / "0.wav", tmp_path / "interview.wav")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=re.escape(families.GUIDE)):
        load_teacher("my-unispeech-sat")
    assert len([line for line in code.splitlines() if line.strip()]) < 60
    exec(compile(code, families.GUIDE, "exec"), {"__name__": "guide"})
    said = capsys.readouterr().out
    assert set(said.strip()) <= {*LETTERS, " "}


def test_the_guide_names_what_must_be_written() -> None:
    needed = set(re.findall(r"`(\w+)`", GUIDE.split("To write are:")[1].split("The others")[0]))
    assert adapter_class("whisper", "").__abstractmethods__ == frozenset()
    assert Adapter.__abstractmethods__ == needed  # type: ignore[attr-defined]


def test_registering_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    register("mine", adapter_class("whisper", ""))
    assert adapter_class("mine", "") is adapter_class("whisper", "")


# What makes a model of a family that we brought ourselves, and tells Transformers of it.
MAKERS = ("ctc", "hf")


@pytest.mark.parametrize("path", sorted((ROOT / "src/usmlite").glob("*.py")), ids=lambda path: path.stem)
def test_nothing_above_the_adapters_asks_for_a_family(path: Path) -> None:
    if path.stem in MAKERS:
        return
    code = path.read_text(encoding="utf-8")
    # The models that tests and demos start from have names; families have not.
    assert not re.search(r"\.family\b|WhisperAdapter|CTCAdapter|WhisperFor|ForCTC|model_type [!=]=", code)

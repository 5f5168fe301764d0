from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSpeechSeq2Seq, WhisperConfig, WhisperForConditionalGeneration

from small_ctc import save_model
from small_whisper import logits, small_student
from usmlite import hf
from usmlite.errors import OutputError, PackedModelError
from usmlite.hf_quantizer import PackedConfig
from usmlite.pack import pack
from usmlite.packed import load_packed

hf.install()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    student, adapter = small_student()
    folder = tmp_path_factory.mktemp("packed") / "model"
    pack(student, adapter, folder)
    return folder


def test_transformers_computes_what_load_packed_does(folder: Path) -> None:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    ours, _ = load_packed(folder)
    assert type(model) is WhisperForConditionalGeneration
    assert torch.equal(logits(model), logits(ours))
    theirs = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert theirs[name].dtype == torch.float32
        assert torch.equal(theirs[name], parameter), name
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def test_nothing_is_missing_and_nothing_left_over(folder: Path) -> None:
    _, info = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


def test_the_base_model_and_other_dtypes(folder: Path) -> None:
    ours, _ = load_packed(folder)
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(base.decoder.embed_tokens.weight, ours.model.decoder.embed_tokens.weight)
    assert torch.equal(base.encoder.embed_positions.weight, ours.model.encoder.embed_positions.weight)
    half = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_saving_writes_the_packed_tensors_again(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "copy" / name).write_bytes((folder / name).read_bytes())
    again, _ = load_packed(tmp_path / "copy")
    assert torch.equal(logits(again), logits(model))
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, tmp_path / "copy")]
    assert abs(sizes[0] - sizes[1]) < 1000
    # Also over itself.
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(load_packed(tmp_path / "copy")[0]), logits(again))


def test_a_changed_model_is_not_saved_as_packed(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight.mul_(1.01)
    with pytest.raises(OutputError, match=r"layers\.0\.fc1\.weight: the weight was changed"):
        model.save_pretrained(tmp_path / "copy")
    half = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(OutputError, match="in float32"):
        half.save_pretrained(tmp_path / "copy")


def test_damage_is_found_here_too(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 4
    weights.write_bytes(data)
    with pytest.raises(PackedModelError, match="altered after packing"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"format_version": 2', '"format_version": 4'))
    with pytest.raises(PackedModelError, match="newer usmlite"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)


def test_a_dense_model_is_not_compressed_on_the_fly(folder: Path, tmp_path: Path) -> None:
    config = WhisperConfig.from_pretrained(folder)
    settings = PackedConfig(**config.quantization_config)
    del config.quantization_config
    dense: nn.Module = WhisperForConditionalGeneration(config)
    dense.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(PackedModelError, match="Run `usmlite compress` first"):
        WhisperForConditionalGeneration.from_pretrained(tmp_path, quantization_config=settings)


def test_installing_twice_changes_nothing() -> None:
    finders = list(sys.meta_path)
    hf.install()
    hf.register()
    assert sys.meta_path == finders


CHECK = """
import sys
from transformers import AutoModelForSpeechSeq2Seq
model = AutoModelForSpeechSeq2Seq.from_pretrained(sys.argv[1])
print(type(model).__name__)
"""
ORDERS = {
    "usmlite first": "from usmlite import hf; hf.install()\n" + CHECK,
    "transformers first": "import transformers; transformers.AutoModelForSpeechSeq2Seq\n"
    "import transformers.quantizers.auto\nfrom usmlite import hf; hf.install()\n" + CHECK,
    "a class of all models first": "from transformers import AutoModelForSpeechSeq2Seq\n"
    "from usmlite import hf; hf.install()\n" + CHECK,
    "transformers first, its registry later": "import transformers\n"
    "from usmlite import hf; hf.install()\n" + CHECK,
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(folder: Path, order: str) -> None:
    code = "import sys\n" + ORDERS[order]
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:usmlite", "-c", code, str(folder)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["WhisperForConditionalGeneration"]


FIRST = {
    "a model that imports the registries": "from transformers import WhisperForConditionalGeneration",
    "another model": "from transformers import BertModel",
    "the configuration": "import transformers.models.whisper.configuration_whisper",
    "our own module": "import usmlite.models.whisper_ctc",
    "transformers": "",
}


@pytest.mark.parametrize("first", FIRST)
def test_the_ctc_model_is_known_whatever_was_imported_first(tmp_path: Path, first: str) -> None:
    save_model(tmp_path, "WhisperForCTC")
    code = (
        "import sys, warnings; warnings.simplefilter('error')\nfrom usmlite import hf; hf.install()\n"
        f"{FIRST[first]}\nfrom transformers import AutoModelForCTC\n"
        "print(type(AutoModelForCTC.from_pretrained(sys.argv[1])).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["WhisperForCTC"]


def test_installing_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom usmlite import hf; hf.install()\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_a_failed_registration_does_not_break_transformers() -> None:
    code = (
        "import sys, warnings\nfrom usmlite import hf; hf.install()\n"
        "sys.modules['usmlite.hf_quantizer'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import transformers.quantizers.auto as auto\n"
        "print(any('usmlite could not register' in str(w.message) for w in caught))\n"
        "print('gptq' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == ["True", "True"]

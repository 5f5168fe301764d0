"""Exports: what they hold is what the packed model holds, or what they said it would be rounded to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq

import exports
import usmlite
from export_readers import multiplied, unpack_words
from pages import place
from small_ctc import WITHOUT, save_model
from small_whisper import logits, small_student, small_teacher
from usmlite import cli
from usmlite.errors import ModelError, OutputError, SpecError, UsmliteError
from usmlite.export import TARGETS, Source, export, ggml, integers, nbits, open_source, plan_export
from usmlite.export.ctranslate2 import vocabulary
from usmlite.kernels import ExpandedWeight
from usmlite.models import load_teacher
from usmlite.models.whisper import ENCODER_POSITIONS
from usmlite.pack import pack
from usmlite.packed import load_packed
from usmlite.spec import CompressionSpec, Int, LayerSpec, Rule

WIDE = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
ROWS = CompressionSpec((Rule("*", LayerSpec(Int(8)), "conv1d"), Rule("*", LayerSpec(Int(8)))))
GROUPS = CompressionSpec((Rule("*", LayerSpec(), "conv1d"), Rule("*", LayerSpec(Int(4), group=32))))
SPECS = {
    "int8": ROWS,
    "int4 groups": GROUPS,
    "int4 2:4": CompressionSpec.simple(4, "2:4", coded=False),
    "rates": CompressionSpec.simple(4),
    "midrise": CompressionSpec.simple(2, "2:4", grid="midrise"),
    "asymmetric": CompressionSpec.simple(8, symmetric=False),
    "float16 2:4": CompressionSpec.simple(None, "2:4"),
}
QUERY = "model.decoder.layers.0.encoder_attn.q_proj.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed models of every kind."""
    folder = tmp_path_factory.mktemp("packed")
    for name, spec in SPECS.items():
        student, adapter = small_student(spec, **WIDE)
        pack(student, adapter, folder / name)
    return {name: folder / name for name in SPECS}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    model, _ = load_packed(directory)
    return dict(model.named_parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_transformers_computes_the_same(spec: str, packed: dict[str, Path], tmp_path: Path) -> None:
    plan = export(packed[spec], "transformers", tmp_path / "out")
    assert plan.exact
    assert plan.bytes_after > plan.bytes_before
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").eval()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ours, _ = load_packed(packed[spec])
    assert torch.equal(logits(model), logits(ours))
    assert load_teacher(tmp_path / "out").adapter.end == usmlite.load(packed[spec]).adapter.end


@pytest.mark.parametrize("form", ["float16", "bfloat16"])
def test_transformers_in_half(form: str, packed: dict[str, Path], tmp_path: Path) -> None:
    plan = export(packed["rates"], "transformers", tmp_path, form=form)
    assert not plan.exact
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype="auto")
    query = model.get_parameter(QUERY)
    dtype = getattr(torch, form)
    assert query.dtype == dtype
    assert torch.equal(query, weights(packed["rates"])[QUERY].to(dtype))


@pytest.mark.parametrize("name", [n for n in ("Wav2Vec2ForCTC", "ParakeetForCTC") if n not in WITHOUT])
def test_ctc_models_in_their_own_class(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "dense", name)
    export(folder, "transformers", tmp_path / "out")
    found, report = AutoModelForCTC.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = usmlite.load(folder)
    audio = [torch.randn(16_000, generator=torch.Generator().manual_seed(1))]
    inputs = ours.adapter.hear(audio[0][None], [1.0])
    inputs = {key: value for key, value in inputs.items() if key != "lengths"}
    with torch.inference_mode():
        assert torch.allclose(
            found.eval()(**inputs).logits, ours.model(**inputs).logits, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ModelError, match=r"ggml has no place .*expected whisper.*transformers"):
        export(folder, "ggml", tmp_path / "ggml.bin")


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("int8", "int8"),
        ("int4 groups", "int8"),
        ("asymmetric", "int8"),
        ("rates", "float16"),
        ("rates", "float32"),
    ],
)
def test_ctranslate2_is_read_back(spec: str, form: str, packed: dict[str, Path], tmp_path: Path) -> None:
    plan = export(packed[spec], "ctranslate2", tmp_path / "out", form=form)
    found = dict(load_teacher(tmp_path / "out").model.named_parameters())
    ours = weights(packed[spec])
    assert found.keys() == ours.keys()
    # Reading computes them again.
    del ours[ENCODER_POSITIONS]
    for name, weight in ours.items():
        if form == "float16" or (form == "int8" and weight.dim() > 1 and "positions" not in name):
            bound = weight.reshape(len(weight), -1).abs().amax(1) / (250 if form == "int8" else 2000)
            difference = (found[name] - weight).reshape(len(weight), -1).abs().amax(1)
            assert bool((difference <= bound + 1e-7).all()), name
        else:
            assert torch.equal(found[name], weight), name
    exact = {row.kind: row.exact for row in plan.changes}
    if form == "int8":
        assert exact["linear"] == (spec == "int8")
    if form == "int8" and spec == "int8":
        assert torch.allclose(found[QUERY], ours[QUERY], rtol=1e-6, atol=0)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(settings["alignment_heads"]) >= 1
    words = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert len(words) == len(set(words)) == usmlite.load(packed[spec]).adapter.config.vocab_size
    assert words[-1] == "<|30.00|>"


def test_tokens_without_a_name_have_none_in_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    # As 50256 of the multilingual models: CTranslate2 tells by the table that a model is one of these.
    _, adapter = small_teacher()
    names = adapter.tokenizer.convert_ids_to_tokens(list(range(adapter.timestamp_begin)))
    names[5] = ""
    monkeypatch.setattr(adapter.tokenizer, "convert_ids_to_tokens", lambda ids: [names[i] for i in ids])
    words = vocabulary(adapter)
    assert words[: adapter.timestamp_begin] == names
    assert words[adapter.timestamp_begin :][:2] == ["<|0.00|>", "<|0.02|>"]
    assert len(words) == adapter.config.vocab_size


def test_ctranslate2_runs(packed: dict[str, Path], tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    export(packed["rates"], "ctranslate2", tmp_path / "out", form="float32")
    ours, _ = load_packed(packed["rates"])
    features = torch.randn(1, 8, 3000, generator=torch.Generator().manual_seed(1))
    model = ctranslate2.models.Whisper(str(tmp_path / "out"), device="cpu", compute_type="float32")
    found = np.asarray(model.encode(ctranslate2.StorageView.from_array(features.numpy())))
    with torch.inference_mode():
        expected = ours.get_encoder()(features).last_hidden_state
    assert np.allclose(found, expected.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "kind"), [("int8", "q8_0"), ("int4 groups", "q4_0"), ("rates", "q8_0"), ("float16 2:4", "f16")]
)
def test_ggml_takes_the_blocks_that_hold_it(
    spec: str, kind: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    plan = export(packed[spec], "ggml", tmp_path / "ggml.bin")
    assert plan.form == kind
    exact = {row.kind: row.exact for row in plan.changes}
    assert exact["linear"] == (kind != "f16")
    # Scales of columns are what its embedding has and ggml has not.
    assert exact["embedding"] == (spec in ("int8", "int4 groups"))
    assert (tmp_path / "ggml.bin").stat().st_size >= plan.bytes_after


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q4_0"])
def test_ggml_blocks_of_levels_are_those_of_weights(kind: str) -> None:
    chosen = ggml.KINDS[kind]
    assert chosen.bits is not None
    assert chosen.encode is not None
    low = -(1 << chosen.bits - 1)
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(low + (kind == "q8_0"), -low, (4, 64), generator=generator, dtype=torch.int8)
    # Rounding finds the same scale where the farthest weight has the level that it gives to that.
    levels[:, ::32] = 127 if kind == "q8_0" else low
    weight = ExpandedWeight(levels, torch.full((4, 2), 2.0**-6), 32)
    assert chosen.take_over(weight) == chosen.encode((levels.float() * 2.0**-6).numpy())
    assert chosen.take_over(ExpandedWeight(levels, torch.full((4, 4), 0.5), 16)) is None
    assert chosen.take_over(ExpandedWeight(levels, torch.full((4, 1), 0.1), None)) is None
    assert chosen.take_over(None) is None


def test_rows_that_ggml_cannot_cut_stay_float16(packed_model: Path, tmp_path: Path) -> None:
    assert export(packed_model, "ggml", tmp_path / "a.bin").form == "f16"
    with pytest.raises(SpecError, match=r"q8_0 packs 32 weights.*multiple of 32, found 24.*--dtype f16"):
        export(packed_model, "ggml", tmp_path / "b.bin", form="q8_0")
    assert not (tmp_path / "b.bin").exists()


@pytest.mark.parametrize("spec", SPECS)
def test_compressed_tensors_holds_the_weights(spec: str, packed: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plan = export(packed[spec], "compressed-tensors", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized"
    weight = weights(packed[spec])[QUERY]
    module = QUERY.removesuffix(".weight")
    if spec == "float16 2:4":
        assert not settings["config_groups"]
        assert torch.equal(tensors[QUERY].float(), weight)
        return
    scheme = next(g["weights"] for g in settings["config_groups"].values() if module in g["targets"])
    steps = tensors[f"{module}.weight_scale"]
    levels = unpack_words(tensors[f"{module}.weight_packed"], scheme["num_bits"], weight.shape[1])
    assert tensors[f"{module}.weight_shape"].tolist() == list(weight.shape)
    found = levels * steps.repeat_interleave(weight.shape[1] // steps.shape[1], dim=1)
    linear = next(row for row in plan.changes if row.kind == "linear")
    if linear.exact:
        assert torch.equal(found.float(), weight)
    else:
        assert spec in ("asymmetric",)
        assert bool((found - weight).abs().max() <= weight.abs().max() / 250)
    assert linear.after.startswith(
        {
            "int4 groups": "int4, groups of 32",
            "midrise": "int3, one",
            "int4 2:4": "int4, one",
            "rates": "int4",
        }.get(spec, "int8")
    )


def test_compressed_tensors_runs(packed: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    export(packed["int4 groups"], "compressed-tensors", tmp_path / "out")
    found = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").eval()
    ours, _ = load_packed(packed["int4 groups"])
    # Embeddings and convolutions are float16 there.
    assert torch.allclose(logits(found), logits(ours), atol=5e-3)


def test_bits_and_blocks() -> None:
    levels = torch.tensor([[-4, 3]], dtype=torch.int8)
    assert integers.bits_of(levels, (2, 3, 4, 8)) == 3
    assert integers.bits_of(levels, (2, 4, 8)) == 4
    assert integers.bits_of(torch.tensor([[0, 200]], dtype=torch.int16), (2, 4, 8)) is None
    weight = ExpandedWeight(torch.zeros(1, 96, dtype=torch.int8), torch.tensor([[1.0, 2.0]]), 64)
    found = integers.block_steps(weight, 32)
    assert found is not None
    assert found.tolist() == [[1.0, 1.0, 2.0]]
    assert integers.block_steps(weight, 128) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_to_the_nearest(bits: int) -> None:
    weight = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0
    levels, steps = integers.round_to_blocks(weight, bits, 16)
    wide = steps.repeat_interleave(16, dim=1)[:, :50]
    # Of the highest level there is one less than of the lowest.
    assert bool(((levels * wide - weight).abs() <= 1.01 * wide.abs() * (0.5 if bits == 8 else 1)).all())
    assert not levels[2].any()


# ONNX


def _tensors(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return model.graph, {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


@pytest.mark.parametrize(
    ("spec", "bits", "block"),
    [
        ("int8", 8, 128),
        ("int4 groups", 4, 32),
        ("int4 2:4", 4, 128),
        ("midrise", 4, 128),
        ("ternary", 2, 128),
    ],
)
def test_onnx_multiplies_by_the_same_integers(
    spec: str, bits: int, block: int, packed: dict[str, Path], tmp_path: Path
) -> None:
    if spec == "ternary":
        student, adapter = small_student(CompressionSpec.simple(2, grid="ternary", coded=False), **WIDE)
        pack(student, adapter, tmp_path / "ternary")
        packed = {"ternary": tmp_path / "ternary"}
    plan = export(packed[spec], "onnx", tmp_path / "out")
    linear = next(row for row in plan.changes if row.kind == "linear")
    assert linear.exact
    graph, tensors = _tensors(tmp_path / "out" / "onnx" / "decoder_model_merged.onnx")
    (node,) = (node for node in graph.node if node.input[1:2] == [f"{QUERY}_codes"])
    values = {attribute.name: attribute.i for attribute in node.attribute}
    assert (values["bits"], values["block_size"], values["accuracy_level"]) == (bits, block, 4)
    assert np.array_equal(multiplied(node, tensors), weights(packed[spec])[QUERY].numpy())


@pytest.mark.parametrize(
    ("spec", "form"),
    [*((spec, "auto") for spec in SPECS), ("int8", "int4"), ("rates", "int8"), ("int8", "float32")],
)
def test_onnx_runs_with_and_without_cache(
    spec: str, form: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    export(packed[spec], "onnx", tmp_path / "out", form=form)
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / f"{name}.onnx")
        for name in ("encoder_model", "decoder_model_merged")
    )
    ours, _ = load_packed(packed[spec])
    features = torch.randn(2, 8, 3000, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[257, 263, 40, 50, 60], [257, 263, 90, 1000, 3]])
    with torch.inference_mode():
        expected = ours(input_features=features, decoder_input_ids=ids).logits
    states = encoder.run(None, {"input_features": features.numpy()})[0]
    names = [output.name for output in decoder.get_outputs()]
    # As Optimum does: something of length 1 that nobody looks at.
    past = {
        name.replace("present", "past_key_values"): np.ones((2, 2, 1, 32), np.float32) for name in names[1:]
    }
    used, pieces = False, []
    for piece in (ids[:, :2], ids[:, 2:4], ids[:, 4:]):
        inputs = {
            "input_ids": piece.numpy(),
            "encoder_hidden_states": states,
            "use_cache_branch": np.array([used]),
        }
        found, *presents = decoder.run(names, {**inputs, **past})
        past = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names[1:], presents, strict=True)
        }
        used = True
        pieces.append(found)
    logits = torch.from_numpy(np.concatenate(pieces, axis=1))
    # Inputs of quantized layers are rounded to 8 bits as well.
    bound = {"float32": 1e-4, "int4": 0.3}.get(form, 1e-3 if spec == "float16 2:4" else 0.05)
    assert float((logits - expected).abs().max()) <= bound * float(expected.abs().max())


def test_onnx_beyond_2_gb(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(importlib.import_module("usmlite.export.graph"), "_MOST_INLINE", 1000)
    export(packed["int8"], "onnx", tmp_path / "out")
    folder = tmp_path / "out" / "onnx"
    assert (folder / "encoder_model.onnx_data").stat().st_size > 1000
    encoder = onnxruntime.InferenceSession(folder / "encoder_model.onnx")
    states = encoder.run(None, {"input_features": np.zeros((1, 8, 3000), np.float32)})[0]
    assert np.isfinite(states).all()
    with pytest.raises(SpecError, match=r"encoder.onnx: the runtime reads no file of more than 2 GB"):
        export(packed["int8"], "sherpa-onnx", tmp_path / "sherpa")
    assert not (tmp_path / "sherpa").exists()


def test_sherpa_onnx_files(packed: dict[str, Path], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    export(packed["int8"], "sherpa-onnx", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "decoder.onnx",
        "encoder.onnx",
        "tokens.txt",
    ]
    properties = {
        item.key: item.value for item in onnx.load(tmp_path / "out" / "encoder.onnx").metadata_props
    }
    ours, adapter = load_packed(packed["int8"])
    assert int(properties["n_text_state"]) == 64
    assert int(properties["sot"]) == adapter.start  # type: ignore[attr-defined]
    lines = (tmp_path / "out" / "tokens.txt").read_text().splitlines()
    assert lines[65].split()[1] == "65"
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / "out" / f"{name}.onnx") for name in ("encoder", "decoder")
    )
    features = torch.randn(1, 8, 3000, generator=torch.Generator().manual_seed(1))
    ids = np.array([[257, 263, 40, 50]])
    with torch.inference_mode():
        expected = ours(input_features=features, decoder_input_ids=torch.from_numpy(ids)).logits
    keys, values = encoder.run(None, {"mel": features.numpy()})
    limit = ours.config.max_target_positions
    cache = [np.zeros((1, 1, limit, 64), np.float32)] * 2
    pieces, offset = [], 0
    for piece in (ids[:, :2], ids[:, 2:3], ids[:, 3:]):
        found, *cache = decoder.run(
            None,
            {
                "tokens": piece, "in_n_layer_self_k_cache": cache[0], "in_n_layer_self_v_cache": cache[1],
                "n_layer_cross_k": keys, "n_layer_cross_v": values, "offset": np.array([offset]),
            },
        )  # fmt: skip
        offset += piece.shape[1]
        pieces.append(found)
        assert cache[0].shape == (1, 1, limit, 64)
    logits = torch.from_numpy(np.concatenate(pieces, axis=1))
    allowed = logits.isfinite()
    assert not allowed[..., adapter.no_timestamps].any()  # type: ignore[attr-defined]
    difference = (logits - expected)[allowed]
    assert float(difference.abs().max()) <= 0.05 * float(expected.abs().max())
    # A window of ten seconds has a third of the positions.
    assert encoder.run(None, {"mel": features[..., :1000].numpy()})[0].shape == (1, 1, 500, 64)


# What is said and refused


def test_plan_says_what_is_widened(
    packed: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["export", str(packed["int4 2:4"]), "--to", "ctranslate2", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--plan"]) == 0
    told = capsys.readouterr().out
    assert "int4 2:4" in told
    assert "int8, one scale a row" in told
    assert "rounded" in told
    assert not (tmp_path / "out").exists()
    assert cli.main(arguments) == 0
    assert (tmp_path / "out" / "model.bin").is_file()
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_bytes_of_the_plan_are_those_of_the_file(packed: dict[str, Path], tmp_path: Path) -> None:
    source = open_source(packed["rates"])
    for target in ("transformers", "compressed-tensors", "ctranslate2", "ggml"):
        plan = export(source, target, tmp_path / target)
        name = "model.bin" if target == "ctranslate2" else "model.safetensors"
        file = tmp_path / target if target == "ggml" else tmp_path / target / name
        header = file.stat().st_size - plan.bytes_after
        assert 0 <= header < 100_000, target


def test_bad_input_is_told(
    packed: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = str(packed["int8"])
    assert cli.main(["export", model, "--to", "tflite", "--out", str(tmp_path / "a")]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in TARGETS)
    assert set(cli.export.EXPORTS) == set(TARGETS)
    with pytest.raises(ModelError, match=r"no such export .*transformers.*found 'tflite'"):
        export(model, "tflite", tmp_path / "a")
    with pytest.raises(
        SpecError, match=r"dtype: ctranslate2 has no such numbers \(expected int8, .*found 'int3'"
    ):
        export(model, "ctranslate2", tmp_path / "a", form="int3")
    with pytest.raises(OutputError, match="no such directory"):
        export(model, "ggml", tmp_path / "none" / "ggml.bin")
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsmliteError, match=r'onnx needs onnx.*pip install "usmlite\[onnx\]"'):
        export(packed["int8"], "onnx", tmp_path / "a")


def test_nothing_stays_of_an_export_that_fails(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(name: str) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    source = open_source(packed["int8"])
    monkeypatch.setattr(source, "tensor", fail)
    for target in ("transformers", "ctranslate2", "ggml"):
        with pytest.raises(OutputError, match="No space left"):
            export(source, target, tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_dense_models_go_too(dense_model: Path, tmp_path: Path) -> None:
    teacher, _ = small_teacher()
    export(dense_model, "transformers", tmp_path / "out")
    found = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    assert torch.equal(found.get_parameter(QUERY), teacher.get_parameter(QUERY))
    source: Source = open_source(dense_model)
    assert plan_export(source, "onnx").form == "float32"
    rounded = plan_export(source, "onnx", "int8")
    assert next(row for row in rounded.changes if row.kind == "linear").after == "int8, blocks of 32"


def test_the_table_in_the_docs_is_that_of_the_results(tmp_path: Path) -> None:
    results = json.loads(exports.RESULTS.read_text(encoding="utf-8"))
    before = exports.DOCUMENT.read_bytes()
    page = tmp_path / "exports.md"
    page.write_bytes(before)
    place(page, "exports", exports.table(results))
    assert page.read_bytes() == before
    assert "evaluation" in results["exports"][exports.OURS]


def test_every_form_is_in_the_help() -> None:
    text = cli.export.EPILOG
    for target in TARGETS.values():
        assert ", ".join(target.forms) in text
    assert nbits.FORMS[0] == "auto"

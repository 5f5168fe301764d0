"""Models packed weight by weight from their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_ctc import save_model
from usmlite.cli import main
from usmlite.compress import compress
from usmlite.errors import ModelError, RecipeError
from usmlite.load import load
from usmlite.packfile import read_manifest
from usmlite.recipe import build_recipe
from usmlite.streamed import INDEX, DenseFiles, Shards


def recipe(source: Path, streamed: bool, **spec: object):
    return build_recipe(
        {
            "model": {"source": str(source), "streamed": streamed},
            "training": {"steps": 0},
            "student": {"start": "magnitude"},
            "spec": spec,
        }
    )


def shard(folder: Path, parts: int = 3) -> None:
    """Cuts model.safetensors into shards with an index, as large models are published."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {}
    for part in range(parts):
        mine = {name: tensors[name] for i, name in enumerate(tensors) if i % parts == part}
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file(mine, folder / file, {"format": "pt"})
        files |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


# wav2vec 2.0 has a weight norm, LASR batch norms.
@pytest.mark.parametrize("name", ["LasrForCTC", "Wav2Vec2ForCTC"])
@pytest.mark.parametrize("spec", [{}, {"bits": 2, "sparsity": "dense", "entropy_coding": False}])
def test_the_file_is_that_of_the_whole_model(name, spec, tmp_path):
    source = save_model(tmp_path / "dense", name)
    whole = compress(recipe(source, False, **spec), tmp_path / "whole")
    shard(source)
    report = compress(recipe(source, True, **spec), tmp_path / "streamed")
    one, other = (read_manifest(tmp_path / run / "packed") for run in ("whole", "streamed"))
    assert one.digest == other.digest
    assert one.layers == other.layers
    assert report["packed_bytes"] == (tmp_path / "streamed/packed/model.safetensors").stat().st_size
    assert report["float32_bytes"] == whole["float32_bytes"]


def test_mapped_weights_compute_what_packed_ones_do(tmp_path):
    source = save_model(tmp_path / "dense", "LasrForCTC")
    compress(recipe(source, True, entropy_coding=False), tmp_path / "run")
    samples = torch.randn(32_000, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    found = []
    for hold in ("packed", "mapped"):
        recognizer = load(tmp_path / "run", hold=hold, activations="float32")
        batch = recognizer.adapter.hear(torch.from_numpy(samples)[None], [2.0])
        with torch.no_grad():
            found.append(recognizer.model(**recognizer.adapter.network.inputs(batch)).logits)
    assert torch.equal(*found)


def test_bfloat16_files_are_read(tmp_path):
    source = save_model(tmp_path / "dense", "LasrForCTC")
    tensors = load_file(source / "model.safetensors")
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(half, source / "model.safetensors", {"format": "pt"})
    compress(recipe(source, True), tmp_path / "run")
    assert read_manifest(tmp_path / "run/packed").layers


def test_what_needs_the_whole_model_is_refused(tmp_path):
    source = save_model(tmp_path / "dense", "LasrForCTC")
    for changes, place in (
        ({"training": {"steps": 2}}, "training.steps"),
        ({"student": {"start": "hessian"}}, "student.start"),
        ({"spec": {"target_size": "9 %"}}, "spec.target_size"),
        ({"data": {"test": "speech"}}, "data"),
    ):
        tables = {
            "model": {"source": str(source), "streamed": True},
            "training": {"steps": 0},
            "student": {"start": "magnitude"},
            **changes,
        }
        with pytest.raises(RecipeError, match=f"^{place}: needs the whole model") as error:
            compress(build_recipe(tables), tmp_path / "run")
        assert "--streamed" in str(error.value)
        assert not (tmp_path / "run").exists()


def test_damaged_sources_give_one_error(tmp_path, capsys):
    source = save_model(tmp_path / "dense", "LasrForCTC")
    shard(source)
    index = json.loads((source / INDEX).read_text())
    flags = ["--no-finetune", "--start", "magnitude", "--streamed", "--out", str(tmp_path / "run")]

    lost = {k: v for k, v in index["weight_map"].items() if not k.endswith("linear1.weight")}
    (source / INDEX).write_text(json.dumps({"weight_map": lost}))
    assert main(["compress", str(source), *flags]) == 2
    assert "linear1.weight" in capsys.readouterr().err

    for file in ("../secret.safetensors", "model-00009-of-00003.safetensors"):
        (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], file)}))
        with pytest.raises(ModelError, match="a file of the index is missing"):
            Shards(source)
    (source / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="an index without a weight_map"):
        Shards(source)

    (source / INDEX).write_text(json.dumps(index))
    first = source / "model-00001-of-00003.safetensors"
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        DenseFiles(source)
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_not_finite_leaves_nothing_behind(tmp_path):
    source = save_model(tmp_path / "dense", "LasrForCTC")
    tensors = load_file(source / "model.safetensors")
    name = "encoder.layers.1.feed_forward1.linear1.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        compress(recipe(source, True), tmp_path / "run")
    assert not (tmp_path / "run/packed").exists()

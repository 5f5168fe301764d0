"""What a run would take, from configurations alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import small_ctc
import small_sequence
import small_transducer
from small_ctc import CONFIGS, save_model
from small_whisper import small_teacher
from usmlite import plan
from usmlite.cli import main
from usmlite.devices import GIB, KNOWN, read_devices
from usmlite.errors import ModelError, RecipeError
from usmlite.footprint import trace
from usmlite.info import describe
from usmlite.plan import make_plan, read_outline
from usmlite.recipe import build_recipe, load_recipe

ROOT = Path(__file__).parents[1]
BIG = ROOT / "recipes/conformer-2b"
CARD = KNOWN["H100-80GB"]


def test_a_footprint_is_what_lives_at_once():
    with torch.device("meta"):
        first, second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
        given = torch.empty(32, 8)
    held = [first.weight, second.weight, given]
    found = trace(lambda: second(first(given).relu()).sum().backward(), held)
    # relu's output is kept, its input not: at the second layer two tensors of 32 x 16 are not alive at once.
    assert found.curve[0] == (0, 4 * 32 * 16)
    gradients = 4 * (8 * 16 + 16 * 4)
    assert found.curve[-1][0] <= gradients
    forward, backward = 2 * 32 * (8 * 16 + 16 * 4), 2 * 32 * (8 * 16 + 2 * 16 * 4)
    assert found.operations == forward + backward  # the input needs no gradient
    assert found.peak(gradients=0.0) <= found.peak()


def test_the_recipe_of_two_billion_is_planned_without_a_weight():
    recipe = load_recipe(BIG / "recipe.toml")
    plan = make_plan(BIG / "config.json", recipe, CARD, engines=("single",), speech_hours=960)
    assert plan.parameters == 1_757_686_016
    assert plan.float32_bytes == 4 * plan.parameters
    assert 0.08 < plan.packed_bytes / plan.float32_bytes < 0.094
    assert plan.coded_bytes < plan.packed_bytes
    single = plan.memory[0]
    assert single.teacher == pytest.approx(4 * plan.parameters, rel=1e-3)
    assert single.optimizer == 8 * plan.trained
    assert plan.steps_for_speech == 960 * 120 / 4
    recomputed = plan.memory[1]
    assert recomputed.recompute
    assert recomputed.peak < single.peak
    assert plan.seconds_per_step[1] > plan.seconds_per_step[0] > 0


FAMILIES = (small_ctc, small_sequence, small_transducer)


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in family.CONFIGS]
)
def test_every_class_is_planned(family, name, tmp_path):
    config = family.small_model(name).config
    (tmp_path / "config.json").write_text(config.to_json_string())
    plan = make_plan(tmp_path / "config.json", build_recipe({}), CARD)
    assert {m.engine for m in plan.memory} == {"single", "ddp", "fsdp2"}
    assert all(m.peak > m.teacher + m.student for m in plan.memory)


def test_bytes_are_those_of_the_file(tmp_path):
    source = save_model(tmp_path, "LasrForCTC")
    recipe = build_recipe({"spec": {"entropy_coding": False}})
    plan = make_plan(source, recipe, CARD, engines=("single",))
    assert plan.packed_bytes == describe(source, recipe.spec.build()).file_bytes
    assert plan.coded_bytes is None


def test_more_devices_hold_less_each_when_sharded():
    recipe = load_recipe(BIG / "recipe.toml")
    outline = json.loads((BIG / "config.json").read_text())
    assert outline["encoder_config"]["num_hidden_layers"] == 32
    one, eight = read_devices("H100-80GB")[0], read_devices("8xh100-80gb")[0]
    alone = make_plan(BIG / "config.json", recipe, one, engines=("fsdp2",))
    together = make_plan(BIG / "config.json", recipe, eight, engines=("ddp", "fsdp2"))
    ddp, fsdp = together.memory[0], together.memory[2]
    assert fsdp.student == alone.memory[0].student // 8
    assert fsdp.masks == alone.memory[0].masks  # every process has all masks
    assert fsdp.peak < 0.6 * ddp.peak


def test_a_depth_is_extrapolated_to_what_the_whole_gives(tmp_path):
    plans = []
    for layers in (3, 6):
        values = {**CONFIGS["LasrForCTC"]["encoder_config"], "num_hidden_layers": layers, "hidden_size": 64}
        config = {"model_type": "lasr_ctc", "vocab_size": 32, "pad_token_id": 0, "encoder_config": values}
        (tmp_path / "config.json").write_text(json.dumps(config))
        plans.append(make_plan(tmp_path / "config.json", build_recipe({}), CARD, engines=("single",)))
        assert read_outline(tmp_path / "config.json").depths == [layers]
    assert plans[0].operations < plans[1].operations < 2 * plans[0].operations
    assert plans[0].memory[0].activations < plans[1].memory[0].activations


@pytest.mark.parametrize("depths", [(6, 6), (6, 3), (1, 5)])
def test_stacks_of_any_depth_are_extrapolated_to_what_the_whole_gives(tmp_path, monkeypatch, depths):
    model, _ = small_teacher(encoder_layers=depths[0], decoder_layers=depths[1])
    config = model.config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    extrapolated = make_plan(tmp_path / "config.json", build_recipe({}), CARD, engines=("single",))
    monkeypatch.setattr(plan, "_SHALLOW", 100)
    whole = make_plan(tmp_path / "config.json", build_recipe({}), CARD, engines=("single",))
    assert extrapolated.operations == pytest.approx(whole.operations, rel=1e-6)
    assert extrapolated.memory[0].activations == pytest.approx(whole.memory[0].activations, rel=0.02)
    assert extrapolated.memory[0].peak == pytest.approx(whole.memory[0].peak, rel=0.02)


@pytest.mark.parametrize(("encoder", "decoder"), [(6, 3), (3, 5)])
def test_a_decoder_of_its_own_depth(tmp_path, monkeypatch, encoder, decoder):
    layers = {"encoder_num_hidden_layers": encoder, "decoder_num_hidden_layers": decoder}
    config = small_sequence.small_model("MoonshineForConditionalGeneration", **layers).config
    (tmp_path / "config.json").write_text(config.to_json_string())
    assert read_outline(tmp_path).depths == [encoder, decoder]
    extrapolated = make_plan(tmp_path, build_recipe({}), CARD, engines=("single",))
    monkeypatch.setattr(plan, "_SHALLOW", 100)
    whole = make_plan(tmp_path, build_recipe({}), CARD, engines=("single",))
    assert extrapolated.operations == pytest.approx(whole.operations, rel=1e-6)
    assert extrapolated.memory[0].peak == pytest.approx(whole.memory[0].peak, rel=0.02)


@pytest.mark.parametrize("name", small_transducer.CONFIGS)
def test_every_place_of_a_transducer_is_counted(name, tmp_path):
    sizes = []
    for vocabulary in (200, 400):
        config = small_transducer.small_model(name, vocab_size=vocabulary).config
        (tmp_path / "config.json").write_text(config.to_json_string())
        plan = make_plan(tmp_path, build_recipe({"training": {"batch_size": 1}}), CARD, engines=("single",))
        sizes.append(plan.memory[0].activations)
    outline = read_outline(tmp_path)
    batch = outline.adapter.outline(1)
    frames = int(outline.adapter.frames(torch.full((1,), batch["input_features"].shape[1])))
    places = frames * batch["decoder_input_ids"].shape[1]
    # The logits of teacher and student at least, in float32.
    assert sizes[1] - sizes[0] >= 2 * 4 * 200 * places


def test_the_command(tmp_path, capsys):
    save_model(tmp_path / "model", "LasrForCTC")
    flags = ["plan", str(tmp_path / "model"), "--devices", "2xA100-40GB", "--engine", "fsdp2"]
    assert main([*flags, "--speech-hours", "10", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["device"]["count"] == 2
    assert found["settings"][0]["engine"] == "fsdp2"
    assert found["settings"][0]["hours"] > 0
    assert found["settings"][0]["fits"] is True
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "2 x A100-40GB" in shown
    assert "Packed" in shown


def test_measured_speed(tmp_path, capsys):
    save_model(tmp_path / "model", "LasrForCTC")
    assert main(["plan", str(tmp_path / "model"), "--engine", "single", "--measure", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["settings"][0]["seconds_per_step"] > 0
    assert "measured here" in found["how"]


def test_a_machine_list(tmp_path):
    file = tmp_path / "cluster.toml"
    file.write_text('[[machine]]\nname = "ours"\ncount = 4\nmemory_gb = 48\ntflops = 180\nlink_gb = 32\n')
    (device,) = read_devices(str(file))
    assert (device.name, device.count, device.memory, device.operations) == ("ours", 4, 48 * 10**9, 180e12)
    for text, message in (
        ("[[machine]]\nname = 'x'\n", "memory_gb"),
        ("[[machine]]\nmemory_gb = -1\n", "above 0"),
        ("[[machine]]\nmemory_gb = 'much'\n", "expected float"),
        ("[[machine]]\nmemroy_gb = 3\n", "memory_gb"),
        ("machine = 3\n", "[[machine]]"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError) as error:
            read_devices(str(file))
        assert message in str(error.value)
    assert read_devices(None)[0].memory > GIB // 4


def test_bad_input_gives_one_error(tmp_path, capsys):
    for flags, message in (
        (["tiny.en", "--devices", "8xH10-80GB"], "H100-80GB"),
        (["tiny.en", "--devices", "0xH100-80GB"], "unknown device"),
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(BIG / "config.json"), "--efficiency", "3"], "0.01 to 1"),
        ([str(BIG / "config.json"), "--bits", "9"], "9"),
    ):
        assert main(["plan", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="no adapter"):
        read_outline(tmp_path / "config.json")

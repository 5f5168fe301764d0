from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from usmlite.errors import RecipeError, SpecError
from usmlite.recipe import (
    DENSE_CTC,
    CTCRecipe,
    Recipe,
    build_recipe,
    keys,
    load_recipe,
    recipe_to_dict,
    recipe_to_toml,
)
from usmlite.spec import NM, Int, LayerSpec


def test_defaults_are_the_headline() -> None:
    recipe = build_recipe({})
    assert recipe == Recipe()
    assert recipe.spec.build().resolve("x", "linear") == LayerSpec(Int(4), NM(2, 4))


def test_keys_are_complete_and_their_flags_unique() -> None:
    found = list(keys())
    flags = [key.flag for key in found]
    assert len(set(flags)) == len(flags)
    names = {
        (section.name, item.name)
        for section in dataclasses.fields(Recipe)
        if section.name != "ctc"  # which is for another command
        for item in dataclasses.fields(getattr(Recipe(), section.name))
    }
    assert {(key.section, key.name) for key in found} == names - {("spec", "rules"), ("training", "phases")}
    for key in found:
        assert key.help
        assert key.kind in (int, float, str, bool)
        assert key.default == getattr(getattr(Recipe(), key.section), key.name)
        assert not key.choices or key.default in key.choices


def test_every_default_is_allowed() -> None:
    assert build_recipe(recipe_to_dict(Recipe())) == Recipe()


def test_the_section_of_a_dense_model() -> None:
    recipe = build_recipe(DENSE_CTC)
    assert recipe.ctc == CTCRecipe()
    assert build_recipe(recipe_to_dict(recipe)) == recipe
    assert "ctc" not in recipe_to_dict(Recipe())
    flags = [key.flag for key in keys(("model", "data", "ctc", "training"))]
    assert len(set(flags)) == len(flags)
    assert build_recipe({"ctc": {"intermediate": "2, 3"}}).ctc.layers() == (2, 3)  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match=r"ctc\.intermediate"):
        build_recipe({"ctc": {"intermediate": "two"}})


def test_toml_and_back(tmp_path: Path) -> None:
    recipe = build_recipe({
        "model": {"source": "base"},
        "data": {"train": 'a "quoted" \\ path.jsonl', "single": 1},
        "spec": {
            "bits": "float", "sparsity": "1:4",
            "rules": [{"match": "*.fc1", "bits": 2, "grid": "midrise"}, {"match": "*", "kind": "conv1d"}],
        },
        "training": {
            "learning_rate": 1e-5, "spec_augment": True,
            "phases": [{"until": 0.5, "kl": 2}, {"until": 1, "ce": 0}],
        },
    })  # fmt: skip
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_whole_numbers_will_do_for_fractions() -> None:
    value = build_recipe({"training": {"clip": 1}}).training.clip
    assert (type(value), value) == (float, 1.0)


def test_rules_come_before_the_one_line_settings() -> None:
    recipe = build_recipe({"spec": {"bits": 4, "rules": [{"match": "*.fc1", "bits": 8}]}})
    spec = recipe.spec.build()
    assert spec.resolve("layer.fc1", "linear") == LayerSpec(Int(8))
    assert spec.resolve("layer.fc2", "linear") == LayerSpec(Int(4), NM(2, 4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9.4%", 94_000),
        ("50 %", 500_000),
        ("14.2MB", 14_200_000),
        ("80kB", 80_000),
        ("1234", 1234),
        (None, None),
    ],
)
def test_target_sizes(text: str | None, expected: int | None) -> None:
    recipe = build_recipe({"spec": {} if text is None else {"target_size": text}})
    assert recipe.spec.target_bytes(1_000_000) == expected


def phases(*tables: dict[str, Any]) -> dict[str, Any]:
    return {"training": {"phases": list(tables)}}


def test_phases_hold_until_their_share_of_the_steps() -> None:
    tables = [{"until": 0.25, "learning_rate": 1, "ce": 0.0}, {"until": 0.5, "states": 30.0}]
    recipe = build_recipe({"training": {"steps": 10, "phases": tables}})
    training = recipe.training
    seen = [(now.learning_rate, now.ce, now.states) for now in map(training.at, range(11))]
    assert seen == [(1.0, 0.0, 10.0)] * 3 + [(1e-4, 0.2, 30.0)] * 2 + [(1e-4, 0.2, 10.0)] * 6
    assert training.ever("learning_rate") == 1.0
    assert training.ever("states") == 30.0
    assert training.ever("embedding_learning_rate") == 0.0


def test_lists_of_bits() -> None:
    recipe = build_recipe({"student": {"bits_schedule": "8, 4,3", "stochastic_bits": "4"}})
    assert recipe.student.schedule() == ((8, 4, 3), (4,))
    assert Recipe().student.schedule() == ((), ())


@pytest.mark.parametrize(
    ("values", "error", "parts"),
    [
        ({"modell": {}}, RecipeError, ["[modell]", "Did you mean 'model'?"]),
        ({"xyz": {}}, RecipeError, ["[xyz]", "Known: model, data"]),
        ({"model": "tiny.en"}, RecipeError, ["not a table", "[model]"]),
        ({"training": {"learning_rat": 1.0}}, RecipeError, ["training.learning_rat", "'learning_rate'?"]),
        ({"spec": {"sparcity": "2:4"}}, RecipeError, ["spec.sparcity", "Did you mean 'sparsity'?"]),
        ({"training": {"qqqq": 1}}, RecipeError, ["unknown key", "Known: steps"]),
        ({"training": {"steps": "many"}}, RecipeError, ["training.steps", "expected int", "'many'"]),
        ({"training": {"steps": 1.5}}, RecipeError, ["training.steps", "expected int", "1.5"]),
        ({"training": {"steps": True}}, RecipeError, ["training.steps", "expected int", "True"]),
        ({"training": {"spec_augment": 1}}, RecipeError, ["training.spec_augment", "expected bool"]),
        ({"training": {"steps": None}}, RecipeError, ["training.steps", "None"]),
        ({"training": {"steps": -1}}, RecipeError, ["training.steps", "at least 0", "-1"]),
        ({"training": {"batch_size": 0}}, RecipeError, ["training.batch_size", "at least 1"]),
        ({"training": {"learning_rate": float("nan")}}, RecipeError, ["training.learning_rate", "nan"]),
        ({"training": {"warmup": 1.5}}, RecipeError, ["training.warmup", "from 0 to 1"]),
        ({"data": {"speed": 0.6}}, RecipeError, ["data.speed", "from 0 to 0.5"]),
        ({"student": {"mask_freeze": -0.1}}, RecipeError, ["student.mask_freeze", "from 0 to 1"]),
        ({"student": {"bits_schedule": "8;4"}}, RecipeError, ["student.bits_schedule", "8,4,3", "'8;4'"]),
        ({"student": {"bits_schedule": "4,8"}}, RecipeError, ["student.bits_schedule", "do not descend"]),
        ({"student": {"bits_schedule": ""}}, RecipeError, ["student.bits_schedule", "unreadable"]),
        ({"student": {"stochastic_bits": "9"}}, RecipeError, ["student.stochastic_bits", "1 to 8"]),
        ({"student": {"stochastic_share": 2}}, RecipeError, ["student.stochastic_share", "from 0 to 1"]),
        ({"spec": {"allocation": "learned"}}, RecipeError, ["spec.allocation", "target_size"]),
        ({"training": {"phases": {}}}, RecipeError, ["[[training.phases]]"]),
        (phases({"kl": 2.0}), RecipeError, ["training.phases[0].until", "above 0", "None"]),
        (phases({"until": 1.5, "kl": 2.0}), RecipeError, ["phases[0].until", "at most 1", "1.5"]),
        (phases({"until": 0.5, "kl": 1}, {"until": 0.5, "kl": 2}), RecipeError, ["phases[1].until", "0.5"]),
        (phases({"until": 0.5}), RecipeError, ["training.phases[0]", "sets nothing"]),
        (
            phases({"until": 0.5, "learning_rat": 1}),
            RecipeError,
            ["phases[0]", "Did you mean 'learning_rate'?"],
        ),
        (
            phases({"until": 0.5, "steps": 5}),
            RecipeError,
            ["phases[0].steps", "not a key of a phase"],
        ),
        (phases({"until": 0.5, "kl": "much"}), RecipeError, ["training.phases[0]", "training.kl", "'much'"]),
        (phases({"until": 0.5, "kl": -1}), RecipeError, ["training.phases[0].kl", "at least 0"]),
        ({"student": {"scales": "minmax"}}, RecipeError, ["student.scales", "Did you mean 'min-max'?"]),
        ({"data": {"targets": "labels"}}, RecipeError, ["data.targets", "teacher, text"]),
        ({"spec": {"bits": "four"}}, RecipeError, ["spec.bits", "'four'"]),
        ({"spec": {"bits": 0}}, SpecError, ["bits", "1 to 8", "found 0"]),
        ({"spec": {"bits": 9}}, SpecError, ["bits", "found 9"]),
        ({"spec": {"sparsity": "3:2"}}, SpecError, ["sparsity", "found 3:2"]),
        ({"spec": {"group": -4}}, RecipeError, ["spec.group", "at least 0"]),
        ({"spec": {"symmetric": False, "grid": "midrise"}}, SpecError, ["midrise", "symmetric"]),
        ({"spec": {"bits": "float", "group": 32}}, SpecError, ["group", "Set bits"]),
        ({"spec": {"target_size": "small"}}, RecipeError, ["spec.target_size", "9.4%", "'small'"]),
        ({"spec": {"target_size": "0%"}}, RecipeError, ["spec.target_size", "'0%'"]),
        ({"spec": {"rules": "all"}}, RecipeError, ["[[spec.rules]]"]),
        ({"spec": {"rules": [3]}}, RecipeError, ["[[spec.rules]]"]),
        ({"spec": {"rules": [{"match": "*", "bit": 4}]}}, SpecError, ["spec.rules[0]", "unknown key", "bit"]),
        ({"spec": {"rules": [{"bits": 4}, {"bits": 40}]}}, SpecError, ["spec.rules[1].bits"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_recipes(values: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        build_recipe(values, where="this.toml")
    for part in parts:
        assert part in str(raised.value)
    if error is RecipeError:
        assert str(raised.value).startswith("this.toml")


def test_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path)
    path = tmp_path / "recipe.toml"
    path.write_text("[training\nsteps = 1")
    with pytest.raises(RecipeError, match=r"recipe\.toml: not a TOML file .*line 1"):
        load_recipe(path)
    path.write_bytes(b"[model]\nsource = '\xff'")
    with pytest.raises(RecipeError, match="not a TOML file"):
        load_recipe(path)


def test_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[training]\nsteps = 5\nseed = 1\n")
    recipe = load_recipe(path, {"training": {"steps": 6}, "model": {"source": "base"}})
    assert (recipe.training.steps, recipe.training.seed, recipe.model.source) == (6, 1, "base")
    # A section that is no table is still the file's mistake.
    path.write_text("training = 5\n")
    assert load_recipe(path, {"training": {"steps": 6}}).training.steps == 6

"""Recipes and grids to named runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from usmlite.errors import RecipeError, SpecError
from usmlite.grid import expand


def written(folder: Path, text: str, name: str = "study.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_one_run_named_after_its_file(tmp_path: Path) -> None:
    [run] = expand([written(tmp_path, "[spec]\nbits = 3\n", "small one.toml")])
    assert (run.name, run.recipe.spec.bits) == ("small-one", 3)
    assert run.origin == str(tmp_path / "small one.toml")


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[training]\nsteps = 7\n[grid]\n"spec.bits" = ["float", 4]\n"spec.sparsity" = ["dense", "2:4"]\n',
    )
    runs = expand([path])
    assert [run.name for run in runs] == [
        "study-float-dense", "study-float-2of4", "study-int4-dense", "study-int4-2of4",
    ]  # fmt: skip
    assert [(run.recipe.spec.bits, run.recipe.spec.sparsity) for run in runs][-1] == (4, "2:4")
    assert {run.recipe.training.steps for run in runs} == {7}


def test_several_grids_with_names_and_settings_of_their_own(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        [[grid]]
        name = "paper {spec.bits}"
        "spec.bits" = [8, 4]
        "student.start" = "magnitude"
        [[grid]]
        [grid.training]
        learning_rate = [1e-4, 2e-4]
        seed = 3
        """,
    )
    runs = expand([path])
    assert [run.name for run in runs] == [
        "paper-int8", "paper-int4", "study-learning-rate-0.0001", "study-learning-rate-0.0002",
    ]  # fmt: skip
    assert [run.recipe.student.start for run in runs] == ["magnitude"] * 2 + ["hessian"] * 2
    assert [run.recipe.training.seed for run in runs] == [0, 0, 3, 3]


def test_keys_that_vary_together(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        [grid]
        "spec.bits, spec.rules" = [[8, []], [4, [{ match = "*.fc1", bits = 3 }]]]
        "spec.entropy_coding" = [true, false]
        """,
    )
    runs = expand([path])
    assert [run.name for run in runs][1:3] == [
        "study-int8-entropy-coding-false", "study-int4-entropy-coding-true",
    ]  # fmt: skip
    assert [run.recipe.spec.rules for run in runs][1:3] == [(), ({"match": "*.fc1", "bits": 3},)]


def test_phases_vary_like_rules(tmp_path: Path) -> None:
    phase = "{ until = 0.5, states = 30.0 }"
    path = written(
        tmp_path, f'[grid]\n"training.phases" = [[], [{phase}]]\n"training.seed" = 3\nname = "x"\n'
    )
    with pytest.raises(RecipeError, match="two runs of one name"):
        expand([path])
    path = written(tmp_path, f'[grid]\n"training.phases, training.seed" = [[[], 0], [[{phase}], 1]]\n')
    assert [len(run.recipe.training.phases) for run in expand([path])] == [0, 1]
    path = written(tmp_path, f'[grid]\n"training.phases" = [{phase}]\n"training.seed" = [0, 1]\n')
    assert [run.recipe.training.at(0).states for run in expand([path])] == [30.0, 30.0]


def test_one_list_of_rules_is_one_value(tmp_path: Path) -> None:
    rule = '{ match = "*.fc1", bits = 3 }'
    path = written(tmp_path, f'[grid]\n"spec.rules" = [{rule}]\n"training.seed" = [0, 1]\n')
    assert [len(run.recipe.spec.rules) for run in expand([path])] == [1, 1]
    path = written(tmp_path, f'[grid]\nname = "x-{{training.steps}}"\n"spec.rules" = [[{rule}]]\n')
    assert [run.name for run in expand([path])] == ["x-steps-1000"]


def test_flags_win_over_file_and_grid(tmp_path: Path) -> None:
    path = written(tmp_path, '[data]\ntrain = "a"\n[grid]\n"spec.bits" = [8, 4]\n"training.steps" = 3\n')
    runs = expand([path], {"training": {"steps": 5}, "data": {"train": "b"}})
    assert [(run.recipe.training.steps, run.recipe.data.train) for run in runs] == [(5, "b")] * 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[grid]\n"spec.bitz" = [4]', ["[grid]: spec.bitz", "unknown key", "Did you mean 'spec.bits'?"]),
        ('[grid]\nsteps = [4]', ["steps", "Did you mean 'training.steps'?"]),
        ('[grid]\n"spec.bits, spec.sprsity" = [[4, "2:4"]]', ["spec.sprsity", "'spec.sparsity'"]),
        ("[grid]\n", ["an empty grid"]),
        ("grid = []\n", ["an empty grid"]),
        ('[grid]\nname = "x"', ["an empty grid"]),
        ("grid = 3\n", ["not a table", "found 3"]),
        ('[grid]\n"spec.bits" = []', ["spec.bits", "an empty list"]),
        ('[grid]\n"spec.bits, training.seed" = 3', ["not a list", "[bits, seed]"]),
        ('[grid]\n"spec.bits, training.seed" = [[3]]', ["a value each", "[bits, seed]", "found [3]"]),
        ('[grid]\n"spec.bits" = [4, 3]\nspec.bits = [2]', ["spec.bits", "twice"]),
        ('[grid]\nname = 3\n"spec.bits" = [4]', ["name", "wrong type"]),
        ('[grid]\nname = "{spec.bit}"\n"spec.bits" = [4]', ["{spec.bit}", "'spec.bits'"]),
        ('[grid]\nname = "..."\n"spec.bits" = [4]', ["a name without letters"]),
        ('[grid]\nname = "x"\n"spec.bits" = [4, 3]', ["two runs of one name", "'x'", "{spec.bits}"]),
        ('[grid]\n"spec.bits" = [4, 4.0]', ["study.toml: spec.bits", "wrong type"]),
        ('[grid]\n"training.warmup" = [0.1, 2.0]', ["training.warmup", "out of range"]),
        ('[[grid]]\n"spec.bits" = [4]\n[[grid]]\nfoo = 1', ["[[grid]] 2: foo"]),
        ("[grid\n", ["not a TOML file"]),
    ],
)  # fmt: skip
def test_wrong_grids_are_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        expand([written(tmp_path, text)])
    message = str(caught.value)
    assert "study.toml" in message
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_an_impossible_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="3:2"):
        expand([written(tmp_path, '[grid]\n"spec.sparsity" = ["2:4", "3:2"]')])


def test_two_runs_must_differ(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = written(tmp_path, "[spec]\nbits = 3\n")
    with pytest.raises(RecipeError, match=r"two runs of one name.*other.*Rename"):
        expand([written(tmp_path / "other", "[spec]\nbits = 4\n", "STUDY.toml"), first])
    grid = written(tmp_path, '[grid]\nname = "{training.seed}-x"\n"training.seed" = [0, 1]\n', "g.toml")
    with pytest.raises(RecipeError, match="two runs of one name"):
        expand([grid], {"training": {"seed": 1}})
    with pytest.raises(RecipeError, match=r"two runs with one recipe.*'g' and 'study'"):
        expand([first, written(tmp_path, "[spec]\nbits = 3\n", "g.toml")])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.toml: cannot read the recipe"):
        expand([tmp_path / "nowhere.toml"])

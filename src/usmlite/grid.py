"""Grid: one recipe file that stands for many runs. Plain data, no torch.

A sweep file is a recipe with a table `[grid]`, or several `[[grid]]`, whose keys are recipe keys:

    [grid]
    name = "paper-{spec.bits}-{spec.sparsity}"        # optional
    "spec.bits" = ["float", 8, 4]                     # a list varies the key
    "spec.sparsity" = ["dense", "2:4"]                # every combination of the lists is a run
    "student.start" = "magnitude"                     # one value holds for all runs of this table
    "training.steps, training.seed" = [[60, 0], [320, 1]]   # keys that vary together
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usmlite.errors import RecipeError
from usmlite.recipe import GRID, LISTS, Recipe, build_recipe, keys, merged, nearest, read_tables
from usmlite.recipe.sections import FLOAT

_NAME = "name"


@dataclass(frozen=True)
class Run:
    """One point of a sweep.

    Attributes:
        name: also the run's folder; letters, digits, dot, dash and underscore.
        recipe: what it does.
        origin: the file it comes from.
    """

    name: str
    recipe: Recipe
    origin: str


@dataclass(frozen=True)
class _Axis:
    """Keys that vary together, and their values, one tuple for each choice."""

    keys: tuple[str, ...]
    choices: tuple[tuple[Any, ...], ...]


def expand(
    paths: Sequence[str | Path], overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Run]:
    """Reads recipes and sweep files.

    Args:
        paths: TOML files. A recipe without a grid is one run, named after its file.
        overrides: `{section: {key: value}}` that win over the files and their grids, as flags do.

    Returns:
        The runs, in the order of the files and, in a grid, of its lists; the last list varies fastest.

    Raises:
        RecipeError: an unreadable file, an unknown key (the nearest known one is suggested), an empty
            grid, two runs with one name or one recipe, or as `build_recipe`.
        SpecError: a spec that cannot be carried out.
    """
    runs = [run for path in paths for run in _runs(Path(path), overrides or {})]
    for index, run in enumerate(runs):
        for other in runs[:index]:
            # Some file systems do not tell capitals from small letters.
            if run.name.casefold() == other.name.casefold():
                raise RecipeError(
                    "two runs of one name",
                    where=run.origin,
                    found=f"'{run.name}', also from {other.origin}",
                    remedy='Rename a file, or give the grid a name such as "ours-{spec.bits}"; '
                    "a flag may have set what the grid varies.",
                )
            if run.recipe == other.recipe:
                raise RecipeError(
                    "two runs with one recipe",
                    where=run.origin,
                    found=f"'{run.name}' and '{other.name}'",
                    remedy="Leave one out; a flag may have set what the grid varies.",
                )
    return runs


def _runs(path: Path, overrides: Mapping[str, Mapping[str, Any]]) -> Iterator[Run]:
    values = read_tables(path)
    found = values.pop(GRID, None)
    if found is None:
        recipe = build_recipe(merged(values, overrides), where=str(path))
        yield Run(_named(path.stem, str(path)), recipe, str(path))
        return
    tables = found if isinstance(found, list) else [found]
    if not tables:
        raise _empty(f"{path}: {GRID}")
    for number, table in enumerate(tables, start=1):
        where = f"{path}: [{GRID}]" if len(tables) == 1 else f"{path}: [[{GRID}]] {number}"
        yield from _points(path, values, table, overrides, where)


def _points(
    path: Path,
    values: Mapping[str, Any],
    table: object,
    overrides: Mapping[str, Mapping[str, Any]],
    where: str,
) -> Iterator[Run]:
    if not isinstance(table, Mapping):
        raise RecipeError("not a table", where=where, expected=f"[{GRID}]", found=repr(table))
    template = table.get(_NAME)
    if not isinstance(template, str | None):
        raise RecipeError("wrong type", where=f"{where}: {_NAME}", expected="text", found=repr(template))
    axes = list(_axes({key: value for key, value in table.items() if key != _NAME}, where))
    if not axes:
        raise _empty(where)
    varied = [key for axis in axes if len(axis.choices) > 1 for key in axis.keys]
    every = [key for axis in axes for key in axis.keys]
    twice = next((key for key in every if every.count(key) > 1), None)
    if twice is not None:
        raise RecipeError("twice in one grid", where=f"{where}: {twice}")
    for choice in itertools.product(*(axis.choices for axis in axes)):
        point: dict[str, dict[str, Any]] = {}
        for key, value in zip(every, itertools.chain.from_iterable(choice), strict=True):
            section, _, name = key.partition(".")
            point.setdefault(section, {})[name] = value
        recipe = build_recipe(merged(merged(values, point), overrides), where=str(path))
        if template is None:
            name = "-".join([path.stem, *(_label(recipe, key) for key in varied if key not in LISTS)])
        else:
            name = _filled(template, recipe, f"{where}: {_NAME}")
        yield Run(_named(name, where), recipe, str(path))


def _axes(table: Mapping[str, Any], where: str) -> Iterator[_Axis]:
    for text, value in _flat(table):
        names = tuple(name.strip() for name in text.split(","))
        for name in names:
            if name not in _known():
                raise RecipeError("unknown key", where=f"{where}: {name}", remedy=_meant(name))
        choices = _choices(names[0], value) if len(names) == 1 else value
        place = f"{where}: {text}"
        if not isinstance(choices, list):
            raise RecipeError("not a list", where=place, expected=_tuples(names), found=repr(value))
        if not choices:
            raise RecipeError(
                "an empty list", where=place, expected="at least one value", remedy="Leave the key out."
            )
        if len(names) == 1:
            choices = [[choice] for choice in choices]
        wrong = [c for c in choices if not isinstance(c, list) or len(c) != len(names)]
        if wrong:
            raise RecipeError(
                "keys that vary together need a value each",
                where=place,
                expected=_tuples(names),
                found=repr(wrong[0]),
            )
        yield _Axis(names, tuple(tuple(choice) for choice in choices))


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys, whether they were written as "spec.bits" or as a table of its own."""
    sections = {key.partition(".")[0] for key in _known()}
    for key, value in table.items():
        if key in sections and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _choices(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    # Rules are a list themselves: a list of lists of rules varies them; phases likewise.
    if key in LISTS and value and all(isinstance(rule, Mapping) for rule in value):
        return [value]
    return value


def _known() -> list[str]:
    return [*(f"{key.section}.{key.name}" for key in keys()), *LISTS]


def _meant(name: str) -> str:
    same = [key for key in _known() if key.partition(".")[2] == name]
    return f"Did you mean '{same[0]}'?" if len(same) == 1 else nearest(name, _known())


def _tuples(names: Sequence[str]) -> str:
    return f"a list of lists such as [{', '.join(name.partition('.')[2] for name in names)}]"


def _empty(where: str) -> RecipeError:
    return RecipeError("an empty grid", where=where, expected='lists such as "spec.bits" = [8, 4]')


def _label(recipe: Recipe, key: str) -> str:
    """What a key's value adds to a run's name: "int4", "2of4", "steps-320"."""
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name)
    if key == "spec.bits":
        return FLOAT if value == FLOAT else f"int{value}"
    if key == "spec.sparsity":
        return str(value).replace(":", "of")
    shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
    return f"{name.replace('_', '-')}-{shown}"


def _filled(template: str, recipe: Recipe, where: str) -> str:
    def label(found: re.Match[str]) -> str:
        key = found[1].strip()
        if key not in _known() or key in LISTS:
            raise RecipeError("unknown key", where=f"{where}: {found[0]}", remedy=_meant(key))
        return _label(recipe, key)

    return re.sub(r"\{([^{}]*)\}", label, template)


def _named(text: str, where: str) -> str:
    """The text as the name of a folder that every file system takes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    if not name:
        raise RecipeError("a name without letters or digits", where=where, found=repr(text))
    return name

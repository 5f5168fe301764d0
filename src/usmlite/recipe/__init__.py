"""Recipe: one file (TOML) that says everything about one run. Plain data, no torch.

Every key is also a flag of `usmlite compress`; both are made from the dataclasses of `sections`, so they
cannot drift apart. A flag overrides the file; a run saves what it really used.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from usmlite.errors import RecipeError
from usmlite.recipe.sections import (
    FLOAT,
    CTCRecipe,
    DataRecipe,
    ModelRecipe,
    SpecRecipe,
    StudentRecipe,
    TrainingRecipe,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LISTS = ("spec.rules", "training.phases")
"""Keys that are lists of tables."""
GRID = "grid"
"""The section that makes a recipe file many runs, see `grid`."""


@dataclass(frozen=True)
class Recipe:
    """Everything about one run of `usmlite compress`, or with `ctc` of `usmlite ctc`."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    spec: SpecRecipe = field(default_factory=SpecRecipe)
    student: StudentRecipe = field(default_factory=StudentRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    ctc: CTCRecipe | None = None


DENSE_CTC: dict[str, dict[str, Any]] = {
    "data": {"targets": "text", "single": 1.0, "by_length": True, "speed": 0.1, "timestamps": 0.0},
    "spec": {"bits": FLOAT, "sparsity": "dense"},
    "student": {"start": "magnitude"},
    "training": {
        "steps": 2000, "batch_size": 16, "learning_rate": 2e-4, "head_learning_rate": 5e-4,
        "kl": 0.0, "ce": 1.0, "states": 0.0, "spec_augment": True, "network_dropout": True, "average": 0.99,
    },
    "ctc": {},
}  # fmt: skip
"""What `usmlite ctc` does where nobody says otherwise."""


@dataclass(frozen=True)
class Key:
    """One key of the recipe, as the command line needs it."""

    section: str
    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    flag: str
    choices: tuple[str, ...]
    path: bool


COMPRESSION = ("model", "data", "spec", "student", "training")
"""The sections of a recipe for `usmlite compress`."""


def keys(sections: Sequence[str] = COMPRESSION) -> Iterator[Key]:
    """Every scalar key of these sections, in order; lists (`LISTS`) exist in the file only."""
    for section in dataclasses.fields(Recipe):
        for item, kind, optional in _fields(section.name) if section.name in sections else ():
            if not item.metadata:
                continue
            yield Key(
                section.name,
                item.name,
                kind,
                optional,
                item.default,
                item.metadata["help"],
                item.metadata["flag"] or item.name.replace("_", "-"),
                item.metadata["choices"],
                item.metadata["path"],
            )


def _section_class(name: str) -> type:
    hint = typing.get_type_hints(Recipe)[name]
    members = typing.get_args(hint) or (hint,)
    return typing.cast(type, next(member for member in members if member is not type(None)))


def _fields(section: str) -> Iterator[tuple[dataclasses.Field[Any], type, bool]]:
    """Fields of a section with their plain type; a union is read as its first member."""
    cls = _section_class(section)
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = next(member for member in members if member is not type(None))
        yield item, kind, type(None) in members


def nearest(wrong: str, known: Sequence[str]) -> str:
    """What a misspelt word may have meant, as a sentence for an error."""
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."


def _checked(
    section: str, item: dataclasses.Field[Any], kind: type, optional: bool, value: Any, where: str
) -> Any:
    place = f"{where}: {section}.{item.name}"
    if value is None and optional:
        return None
    if item.name == "bits" and value == FLOAT:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(rule, Mapping) for rule in value):
            raise RecipeError(
                f"unreadable {item.name}",
                where=place,
                expected=f"[[{section}.{item.name}]] tables",
                found=repr(value),
            )
        return tuple(dict(rule) for rule in value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError("wrong type", where=place, expected=kind.__name__, found=repr(value))
    choices = item.metadata.get("choices", ())
    if choices and value not in choices:
        raise RecipeError(
            "unknown choice",
            where=place,
            expected=", ".join(choices),
            found=repr(value),
            remedy=nearest(str(value), list(choices)),
        )
    return value


# What a phase of training may set.
PHASE_KEYS = (
    "learning_rate",
    "scale_learning_rate",
    "mask_learning_rate",
    "embedding_learning_rate",
    "head_learning_rate",
    "kl",
    "ce",
    "states",
    "layers",
    "attention",
    "temperature",
)


def _checked_phases(values: Sequence[Mapping[str, Any]], where: str) -> tuple[dict[str, Any], ...]:
    """The phases with floats for numbers.

    Raises:
        RecipeError: an unknown key, a value out of range, or phases that are not in order.
    """
    fields = {item.name: (item, kind, optional) for item, kind, optional in _fields("training")}
    out, last = [], 0.0
    for number, values_here in enumerate(values):
        place = f"{where}: training.phases[{number}]"
        until = values_here.get("until")
        if isinstance(until, bool) or not isinstance(until, int | float) or not last < until <= 1:
            raise RecipeError(
                "a phase without its end",
                where=f"{place}.until",
                expected=f"a share of the steps above {last:g} and at most 1",
                found=repr(until),
            )
        last = float(until)
        phase = {"until": last}
        for key, value in values_here.items():
            if key == "until":
                continue
            if key not in PHASE_KEYS:
                raise RecipeError(
                    "not a key of a phase", where=f"{place}.{key}", remedy=nearest(key, list(PHASE_KEYS))
                )
            phase[key] = _checked("training", *fields[key], value, place)
            _check_range(f"training.{key}", phase[key], f"{place}.{key}")
        if len(phase) == 1:
            raise RecipeError(
                "a phase that sets nothing", where=place, expected=f"some of {', '.join(PHASE_KEYS)}"
            )
        out.append(phase)
    return tuple(out)


# Keys whose values are files or directories; a model may also be a name.
_PLACES = (
    ("model", "source"),
    ("data", "train"),
    ("data", "dev"),
    ("data", "test"),
    ("data", "transcripts"),
    ("spec", "measured"),
)
# Numbers below these make no sense; above, for shares, neither.
_LOWEST = {
    "training.steps": 0,
    "training.batch_size": 1,
    "training.accumulate": 1,
    "training.learning_rate": 0.0,
    "training.clip": 0.0,
    "training.temperature": 1e-3,
    "training.eval_every": 1,
    "training.seed": 0,
    "training.eval_utterances": 1,
    "training.checkpoint_every": 1,
    "student.calibration": 1,
    "student.mask_every": 1,
    "spec.group": 0,
    "spec.embedding_bits": 0,
    "spec.allocation_steps": 1,
    "training.kl": 0.0,
    "training.ce": 0.0,
    "training.states": 0.0,
    "training.layers": 0.0,
    "training.attention": 0.0,
    "training.weight_decay": 0.0,
    "training.scale_learning_rate": 0.0,
    "training.mask_learning_rate": 0.0,
    "training.embedding_learning_rate": 0.0,
    "training.head_learning_rate": 0.0,
    "ctc.vocabulary_size": 2,
    "ctc.head_steps": 0,
    "ctc.chunk": 0.0,
    "ctc.left_chunks": 0,
    "ctc.time_reduction": 1,
    "student.mask_decay": 0.0,
    "data.max_wer": 0.0,
    "data.level": 0.0,
}
_SHARES = {
    "data.timestamps": 1.0,
    "data.single": 1.0,
    "data.noise": 1.0,
    "data.swapped": 1.0,
    "data.speed": 0.5,
    "student.mask_freeze": 1.0,
    "student.stochastic_share": 1.0,
    "training.warmup": 1.0,
    "training.average": 0.9999,
    "training.final_rate": 1.0,
    "ctc.dropout": 1.0,
}


def _check_range(key: str, value: Any, where: str) -> None:
    low, high = 0.0 if key in _SHARES else _LOWEST.get(key), _SHARES.get(key)
    too_low = low is not None and not value >= low
    if too_low or (high is not None and value > high):
        bound = f"at least {low:g}" if high is None else f"a share from 0 to {high:g}"
        raise RecipeError("out of range", where=where, expected=bound, found=value)


def build_recipe(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """A recipe from nested tables.

    Args:
        values: `{section: {key: value}}`.
        where: the file or command the values come from, for messages.

    Raises:
        RecipeError: an unknown section or key (the nearest known one is suggested), a value of the
            wrong type or out of range.
        SpecError: a spec that cannot be carried out.
    """
    sections = [item.name for item in dataclasses.fields(Recipe)]
    built: dict[str, Any] = {}
    for section, table in values.items():
        if section not in sections:
            grid = "A file with a grid is for 'usmlite sweep'."
            remedy = grid if section == GRID else nearest(section, sections)
            raise RecipeError("unknown section", where=f"{where}: [{section}]", remedy=remedy)
        if not isinstance(table, Mapping):
            raise RecipeError(
                "not a table", where=f"{where}: {section}", expected=f"[{section}]", found=repr(table)
            )
        known = {item.name: (item, kind, optional) for item, kind, optional in _fields(section)}
        checked = {}
        for key, value in table.items():
            if key not in known:
                raise RecipeError(
                    "unknown key", where=f"{where}: {section}.{key}", remedy=nearest(key, list(known))
                )
            checked[key] = _checked(section, *known[key], value, where)
            _check_range(f"{section}.{key}", checked[key], f"{where}: {section}.{key}")
        if section == "training" and "phases" in checked:
            checked["phases"] = _checked_phases(checked["phases"], where)
        built[section] = _section_class(section)(**checked)
    recipe = Recipe(**built)
    recipe.spec.build()
    recipe.spec.target_bytes(1, where=f"{where}: spec.target_size")
    recipe.student.schedule(where=f"{where}: student")
    if recipe.ctc is not None:
        recipe.ctc.layers()
    if recipe.spec.allocation == "learned" and recipe.spec.target_size is None:
        raise RecipeError(
            "a learned allocation needs a budget",
            where=f"{where}: spec.allocation",
            expected="target_size as well, such as 9.4%",
        )
    return recipe


def read_tables(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, unchecked.

    Raises:
        RecipeError: the file is missing or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError("cannot read the recipe", where=path, found=error.strerror) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError("not a TOML file", where=path, found=str(error)) from None


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with others on top, key by key."""
    out = dict(values)
    for section, table in overrides.items():
        base = out.get(section, {})
        if isinstance(table, Mapping):
            out[section] = {**(base if isinstance(base, Mapping) else {}), **table}
        else:
            out[section] = table  # a mistake that whoever checks them names
    return out


def load_recipe(
    path: str | Path,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Recipe:
    """Reads a TOML recipe; `overrides` (the command line's flags) win over the file, and it over `defaults`.

    Raises:
        RecipeError: the file is missing or not TOML, or as `build_recipe`.
    """
    return build_recipe(merged(merged(defaults or {}, read_tables(path)), overrides or {}), where=str(path))


def recipe_to_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Nested tables without None, as TOML and JSON hold them."""
    out: dict[str, dict[str, Any]] = {}
    for section in dataclasses.fields(Recipe):
        if getattr(recipe, section.name) is None:
            continue
        table = dataclasses.asdict(getattr(recipe, section.name))
        out[section.name] = {
            key: [dict(rule) for rule in value] if isinstance(value, tuple) else value
            for key, value in table.items()
            if value is not None and value != ()
        }
    return out


def without_places(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A recipe's tables with names instead of the places of things on this machine, for others to read."""
    out = {section: dict(table) for section, table in tables.items()}
    for section, key in _PLACES:
        value = out.get(section, {}).get(key)
        if not isinstance(value, str):
            continue
        if section != "model" or Path(value).is_absolute() or Path(value).is_dir():
            out[section][key] = Path(value).name
    return out


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML file's text."""
    import tomli_w

    return tomli_w.dumps(recipe_to_dict(recipe))

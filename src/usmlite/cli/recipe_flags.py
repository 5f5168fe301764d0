"""Every key of a recipe as a flag, which wins over the recipe file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from usmlite.errors import RecipeError
from usmlite.recipe import Key, Recipe, build_recipe, keys, load_recipe, merged

SECTIONS = {
    "model": "where to start",
    "data": "speech to train on, choose on and report on",
    "spec": "what each weight becomes",
    "student": "how the student starts and how its masks, scales and bits behave",
    "training": "the fine-tuning",
}
OTHERS = {"ctc": "the model that is made"}


def add_recipe_flags(
    parser: argparse.ArgumentParser,
    sections: Iterable[str],
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """The keys of these sections, with the recipe's own help, and its defaults where there are no others."""
    for section in sections:
        group = parser.add_argument_group(f"[{section}] {(SECTIONS | OTHERS)[section]}")
        for key in keys((section,)):
            if (key.section, key.name) != ("model", "source"):
                default = (defaults or {}).get(section, {}).get(key.name, key.default)
                _add_recipe_flag(group, replace(key, default=default))
        if section == "model":
            group.add_argument(
                "--model",
                dest="model.source",
                default=argparse.SUPPRESS,
                metavar="MODEL",
                help="the same as MODEL",
            )


def _add_recipe_flag(group: Any, key: Key) -> None:
    # SUPPRESS: only what was given is in the namespace, and so wins over the recipe file.
    settings: dict[str, Any] = {"dest": f"{key.section}.{key.name}", "default": argparse.SUPPRESS}
    text = key.help.replace("%", "%%")
    if "(default:" not in text:
        text += f" (default: {shown(key.default)})"
    if key.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        names = {int: "N", float: "X", str: "PATH" if key.path else "TEXT"}
        settings["metavar"] = "{" + ",".join(key.choices) + "}" if key.choices else names[key.kind]
        settings["type"] = _converter(key)
    group.add_argument(f"--{key.flag}", help=text, **settings)


def shown(default: object) -> str:
    """A default as help shows it."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if default is None:
        return "none"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _converter(key: Key) -> Callable[[str], Any]:
    """Text to the key's type. Ranges and choices are the recipe's business."""

    def convert(text: str) -> Any:
        if key.kind is str or (key.name == "bits" and text == "float"):
            return text
        try:
            return key.kind(text)
        except ValueError:
            expected = "a whole number" if key.kind is int else "a number"
            if key.name == "bits":
                expected += ", or 'float'"
            raise RecipeError(
                "unreadable value", where=f"--{key.flag}", expected=expected, found=repr(text)
            ) from None

    return convert


def recipe_values(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The recipe keys that were given as flags, by section."""
    values: dict[str, dict[str, Any]] = {}
    for name, value in vars(arguments).items():
        section, dot, key = name.partition(".")
        if dot:
            values.setdefault(section, {})[key] = value
    return values


def recipe_from(
    arguments: argparse.Namespace, file: Path | None, defaults: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """The recipe file, if there is one, with the flags on top and other defaults below.

    Raises:
        RecipeError: a wrong flag or file.
        SpecError: a spec that cannot be carried out.
    """
    values = recipe_values(arguments)
    # Alone first, so that a wrong flag is not put down to the file.
    recipe = build_recipe(merged(defaults or {}, values), where="command line")
    return recipe if file is None else load_recipe(file, values, defaults or {})


def set_once(arguments: argparse.Namespace, name: str, value: object, flag: str) -> None:
    """Sets a recipe key from a second way to say it, which must not say something else."""
    if vars(arguments).get(name, value) != value:
        raise RecipeError("contradicts another flag", where=flag, found=f"{name} = {vars(arguments)[name]!r}")
    setattr(arguments, name, value)

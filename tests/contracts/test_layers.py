"""Modules import lower rows of the README's map only, and the map and the tree agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/usmlite"
# The package's own front: it names everything, and nothing below may import from it ...
FRONT = {"__init__", "__main__"}
# ... but for these names.
FROM_FRONT = {"__version__"}
HEAVY = {"torch", "numpy", "transformers", "accelerate", "soundfile", "soxr", "jiwer", "safetensors", "rich"}


def layers() -> dict[str, int]:
    """Module (or sub-package) to row, from the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- layers -->\n```\n(.*?)```\n<!-- /layers -->", text, re.DOTALL)
    assert found is not None, "the README has no map between its markers"
    rows: dict[str, int] = {}
    level = -1
    for line in found[1].splitlines():
        parts = re.fullmatch(r"(?:L(\d+))? +([a-z_]+/?) +\S.*", line)
        assert parts is not None, f"unreadable line of the map: {line!r}"
        if parts[1] is not None:
            assert int(parts[1]) == level + 1, f"layers out of order: {line!r}"
            level += 1
        assert parts[2] not in rows, f"twice in the map: {parts[2]}"
        rows[parts[2]] = level
    return rows


def files() -> dict[str, Path]:
    """Dotted name below usmlite to file; a package is called like its folder."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        out[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return out


FILES = files()
LIGHT = (
    *("__init__", "errors", "spec", "recipe", "recipe.sections", "grid", "shipped", "hf"),
    *(name for name in FILES if name.partition(".")[0] == "cli"),
)


def unit(name: str) -> str:
    """The line of the map that a dotted name belongs to."""
    head = name.partition(".")[0]
    return f"{head}/" if (PACKAGE / head).is_dir() else head


def imports(name: str, *, top_level: bool = False) -> set[str]:
    """Dotted names below usmlite that a module imports, anywhere in it or only when it is loaded."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "usmlite"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {name}"
            if node.module is not None and node.module.split(".")[0] == "usmlite":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}".partition(".")[2]
                    if node.module == "usmlite" and alias.name in FROM_FRONT:
                        continue
                    found.add(whole if whole in FILES else node.module)
    return {item.removeprefix("usmlite.") if item != "usmlite" else "__init__" for item in found}


def test_map_and_tree_agree() -> None:
    tree = {unit(name) for name in FILES if name not in FRONT}
    assert set(layers()) == tree


def test_no_module_is_named_utils() -> None:
    parts = {part for name in FILES for part in name.split(".")}
    assert not parts & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("name", sorted(set(FILES) - FRONT))
def test_imports_lower_rows_only(name: str) -> None:
    rows, own = layers(), unit(name)
    for imported in imports(name):
        assert imported not in FRONT, f"{name} imports from the package's front"
        other = unit(imported)
        if other != own:
            assert rows[other] < rows[own], f"{name} (L{rows[own]}) imports {imported} (L{rows[other]})"


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in imports(name):
                if imported in FILES:
                    visit(imported, (*path, name))
            done.add(name)

    for name in set(FILES) - FRONT:
        visit(name, ())


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_nothing_heavy(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {item.split(".")[0] for item in names} & HEAVY
    for imported in imports(name, top_level=True):
        assert imported in LIGHT, f"{name} loads {imported}"


def test_nothing_is_unpickled() -> None:
    banned = re.compile(r"\b(pickle|torch\.load|joblib|shelve|marshal|allow_pickle\s*=\s*True)\b")
    for name, path in FILES.items():
        code = "\n".join(
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if not line.lstrip().startswith("#")
        )
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not banned.search(ast.unparse(node)), name
            elif isinstance(node, ast.Call):
                assert not banned.search(ast.unparse(node.func)), name
                assert not any(k.arg == "allow_pickle" for k in node.keywords), name

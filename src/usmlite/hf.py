"""Lets Transformers load packed models: `AutoModelForSpeechSeq2Seq.from_pretrained(directory)`.

Transformers finds a quantizer by name in a registry that it fills when `transformers.quantizers.auto` is
imported. `install` enters ours there: at once if that module is loaded, else in the moment it is. So
`import usmlite` costs nothing, and the order of the two imports does not matter.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Registers the quantizer, now or when Transformers loads its registry. May be called again."""
    module = sys.modules.get(_REGISTRY)
    # A registry that is still being loaded has a spec that says so.
    loading = bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
    if module is not None and not loading:
        register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def register() -> None:
    """Enters the quantizer into Transformers' registry; imports Transformers. May be called again."""
    from usmlite import hf_quantizer

    hf_quantizer.register()


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; makes the loader of the registry call `register` after its work."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """The registry's own loader, and `register` afterwards."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            register()
        except Exception as error:
            # Somebody's other model must load even if ours cannot.
            warnings.warn(f"usmlite could not register with Transformers: {error}", stacklevel=2)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

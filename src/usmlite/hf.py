"""Tells Transformers about what is ours: packed models, and Whisper's encoder with a CTC head.

`AutoModelForSpeechSeq2Seq.from_pretrained(directory)` then loads packed models, and `AutoModelForCTC` what
`usmlite ctc` makes. Transformers looks such things up by name in registries, which it fills when the modules
that they are in are imported. `install` enters ours there: at once where such a module is loaded, else in the
moment it is. So `import usmlite` costs nothing, and the order of the two imports does not matter.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType


def install() -> None:
    """Registers what is ours, now or when Transformers loads its registries. May be called again."""
    there = [name for name in _REGISTRIES if name in sys.modules and not _loading(name)]
    # First: to enter something in one registry may load another one.
    if len(there) < len(_REGISTRIES) and not any(isinstance(each, _RegistryFinder) for each in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
    for name in there:
        _REGISTRIES[name]()


def register() -> None:
    """Enters everything into Transformers' registries; imports Transformers. May be called again."""
    for enter in _REGISTRIES.values():
        enter()


def _quantizer() -> None:
    from usmlite import hf_quantizer

    hf_quantizer.register()


def _configuration() -> None:
    from transformers import AutoConfig

    from usmlite.models.whisper_ctc_config import MODEL_TYPE, WhisperCTCConfig

    AutoConfig.register(MODEL_TYPE, WhisperCTCConfig, exist_ok=True)


def _model(loaded: str = "") -> None:
    # These import each other: the one of them that is still being loaded calls again at its end.
    if not any(_loading(name) for name in _BEFORE_MODEL if name != loaded):
        importlib.import_module("usmlite.models.whisper_ctc")  # registers itself


def _loading(name: str) -> bool:
    """Whether a module is being loaded right now: its spec says so."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


_BEFORE_MODEL = (
    "transformers.modeling_layers",
    "transformers.models.whisper.configuration_whisper",
    "transformers.models.whisper.modeling_whisper",
)
_REGISTRIES: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _quantizer,
    "transformers.models.auto.configuration_auto": _configuration,
    "transformers.models.auto.modeling_auto": _model,
    **{name: partial(_model, name) for name in _BEFORE_MODEL},
}


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; makes the loaders of the registries enter what is ours after their work."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, _REGISTRIES[fullname])
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """The registry's own loader, and what enters ours afterwards."""

    def __init__(self, loader: importlib.abc.Loader, enter: Callable[[], None]) -> None:
        self._loader, self._enter = loader, enter

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            self._enter()
        except Exception as error:
            # Somebody's other model must load even if ours cannot.
            warnings.warn(f"usmlite could not register with Transformers: {error}", stacklevel=2)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

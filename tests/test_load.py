from __future__ import annotations

from pathlib import Path

import pytest

from usmlite.errors import ModelError
from usmlite.kernels import native
from usmlite.load import load
from usmlite.packed import PackedLinear, fastest_hold


def test_packed_models_are_held_as_they_run_fastest(
    packed_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fastest_hold() == ("int8" if native.paths() else "float32")
    expected = bool(native.paths())
    assert any(isinstance(layer, PackedLinear) for layer in load(packed_model).model.modules()) == expected
    monkeypatch.setenv(native.VARIABLE, "reference")
    assert fastest_hold() == "float32"
    assert not any(isinstance(layer, PackedLinear) for layer in load(packed_model).model.modules())


def test_kernels_that_are_not_there_are_refused(packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "abacus")
    with pytest.raises(ModelError, match=r"'abacus'.*reference.*Unset"):
        load(packed_model)

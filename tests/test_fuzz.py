"""The first cases of `make fuzz`, so that it stays able to run."""

from __future__ import annotations

from pathlib import Path

import fuzz


def test_damaged_models_load_or_are_refused(tmp_path: Path) -> None:
    models = fuzz.make_models(tmp_path)
    seen = {fuzz.run_case(models, tmp_path, seed) for seed in range(60)}
    assert seen == {"loaded", "refused: PackedModelError"}

"""Model cards: what a packed model is, what it cost, and how to run it, as the hub reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import tomli_w
from huggingface_hub import EvalResult, ModelCardData

# What a recipe says of the machine that it ran on is nobody's business.
_PLACES = {"data": ("train", "dev", "test", "transcripts"), "spec": ("measured",)}
# Whose weights the names of packaged models are.
_PARENTS = {"tiny.en": "openai/whisper-tiny.en", "base": "openai/whisper-base"}

_USE = """\
## Use

```sh
pip install usmlite
usmlite transcribe {name} interview.wav
```

```python
import usmlite

print(usmlite.load("{name}").transcribe("interview.wav").text)
```

The weights are low-bit codes in `model.safetensors` (usmlite format {format}), checked by SHA-256 when they
are loaded. With `import usmlite` first, `from_pretrained("{name}")` of Transformers reads them too.
"""

_LIMITS = """\
## Limits

What a compressed model loses was measured on the speech above and nowhere else. On noisier, accented,
spontaneous or technical speech its parent's own errors grow, and what is lost against the parent may too.
"""


def model_card(
    name: str,
    *,
    language: str | None,
    weights_bytes: int,
    format_version: int,
    report: Mapping[str, Any] | None = None,
    license_id: str | None = None,
) -> str:
    """The README.md of a packed model.

    Args:
        name: "USER/NAME" on the hub.
        language: the model's only language, or None.
        weights_bytes: of its weights file.
        format_version: of that file.
        report: the `report.json` of the run that made it; without one the card has no figures of quality.
        license_id: the weights' license as the hub names it, or None if the user has not said.

    Returns:
        Markdown with a YAML header, whose `model-index` holds the measured word error rates.
    """
    parts = [f"---\n{_header(name, language, report, license_id)}\n---\n# {name.partition('/')[2]}\n"]
    if report is None:
        parts.append(
            f"A speech recognition model packed by usmlite into {weights_bytes / 1e6:.1f} MB. What that "
            "cost in accuracy has not been recorded.\n"
        )
    else:
        parts.append(_made(report, weights_bytes))
    parts.append(_USE.format(name=name, format=format_version))
    if report is not None:
        parts += [_repeat(report), _LIMITS]
    return "\n".join(parts)


def _header(name: str, language: str | None, report: Mapping[str, Any] | None, license_id: str | None) -> str:
    source = None if report is None else str(report["model"])
    # A directory of this machine is no name on the hub.
    parent = None if source is None else _PARENTS.get(source, source if source.count("/") == 1 else None)
    results = None if report is None else _results(report)
    data = ModelCardData(
        language=language,
        license=license_id,
        library_name="usmlite",
        base_model=None if parent is None or PurePath(parent).is_absolute() else parent,
        pipeline_tag="automatic-speech-recognition",
        tags=["usmlite", "quantized", "compressed"],
        model_name=name.partition("/")[2] if results else None,
        eval_results=results,
    )
    return data.to_yaml()


def _results(report: Mapping[str, Any]) -> list[EvalResult] | None:
    packed = report.get("evaluations", {}).get("packed")
    if packed is None:
        return None
    return [
        EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Automatic Speech Recognition",
            dataset_type="custom",
            dataset_name=_corpus(report),
            metric_type="wer",
            metric_name="Word error rate, %",
            metric_value=round(100 * packed["wer"], 2),
        )
    ]


def _corpus(report: Mapping[str, Any]) -> str:
    data = report["recipe"].get("data", {})
    place = data.get("test") or data.get("dev")
    return "test speech" if place is None else PurePath(str(place)).name


def _made(report: Mapping[str, Any], weights_bytes: int) -> str:
    share = 100 * weights_bytes / report["float32_bytes"]
    model = PurePath(str(report["model"])).name if str(report["model"]).startswith("/") else report["model"]
    rows = [("weights", f"{weights_bytes / 1e6:.2f} MB, {share:.1f} % of the dense model in float32")]
    evaluations = report.get("evaluations", {})
    if "packed" in evaluations:
        packed = evaluations["packed"]
        rows.append(("word error rate", _wer(packed)))
        if "dense" in evaluations:
            rows.append(("of the dense model", _wer(evaluations["dense"])))
        rows.append(("measured on", _measured(report, packed)))
    if "difference" in report:
        rows.append(("difference, paired", _difference(report["difference"])))
    rows.append(("made with", _training(report)))
    table = "\n".join(f"| {what} | {text} |" for what, text in rows)
    return f"`{model}`, compressed by usmlite.\n\n| | |\n| --- | --- |\n{table}\n"


def _wer(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{100 * found['wer']:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})"


def _measured(report: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    hours = found["audio_seconds"] / 3600
    return f"{_corpus(report)}: {found['utterance_count']} utterances, {hours:.2f} h; greedy"


def _difference(found: Mapping[str, Any]) -> str:
    relative = found.get("relative_difference")
    if relative is None:
        return f"{100 * found['difference']:+.2f} percentage points, p = {found['p_value']:.2g}"
    low, high = found["relative_ci95"]
    text = f"{100 * relative:+.1f} % relative ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{text}, p = {found['p_value']:.2g}"


def _training(report: Mapping[str, Any]) -> str:
    trained, data = report["recipe"]["training"], report.get("data", {}).get("train")
    told = "" if data is None else f" of {data['seconds'] / 3600:.1f} h of speech"
    if report.get("training") is None:
        windows = report["recipe"]["student"]["calibration"]
        return f"no fine-tuning; calibrated on {windows} windows of 30 s{told}"
    windows = trained["batch_size"] * trained["accumulate"]
    return f"{report['training']['best_step']} steps of fine-tuning with {windows} windows of 30 s{told}"


def _repeat(report: Mapping[str, Any]) -> str:
    recipe = {
        section: {key: value for key, value in table.items() if key not in _PLACES.get(section, ())}
        for section, table in report["recipe"].items()
    }
    versions: Sequence[str] = [f"{name} {number}" for name, number in report.get("versions", {}).items()]
    return (
        "## To make it again\n\n`usmlite compress --recipe FILE --data SPEECH --out DIR` with this recipe "
        f"({', '.join(versions)}):\n\n```toml\n{tomli_w.dumps(recipe)}```\n"
    )

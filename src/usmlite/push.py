"""A packed model put on the Hugging Face hub, with a model card made from its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from usmlite.card import model_card
from usmlite.errors import ModelError, UsmliteError
from usmlite.hub import explained
from usmlite.load import PACKED_FOLDER, RECIPE_FILE, REPORT_FILE, load
from usmlite.packfile import CONFIG_NAME, PROCESSOR_FILES, WEIGHTS_NAME, is_packed, read_manifest

CARD_FILE = "README.md"


def push(
    source: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license_id: str | None = None,
    card: str | Path | None = None,
) -> str:
    """Puts a packed model on the hub, with a model card; makes the repository if there is none.

    All files go in one commit: what is on the hub is always a whole model.

    Args:
        source: a packed model, or the run that made it, whose figures the card then has.
        name: "USER/NAME".
        private: whether a new repository is; one that is there stays as it is.
        revision: the branch; the main one if None. A new one is made.
        message: of the commit.
        license_id: the weights' license as the hub names it, such as "mit".
        card: a README.md to take instead of the one that is made.

    Returns:
        The commit's address.

    Raises:
        ModelError: the source is no packed model, or a damaged one; or the hub cannot be reached, or refuses.
        UsmliteError: the card or the report cannot be read.
    """
    packed, text = prepare(source, name, license_id=license_id, card=card)
    api = HfApi(library_name="usmlite")
    present = [packed / file for file in (CONFIG_NAME, WEIGHTS_NAME, *sorted(PROCESSOR_FILES))]
    operations = [CommitOperationAdd(CARD_FILE, text.encode())]
    operations += [CommitOperationAdd(path.name, str(path)) for path in present if path.is_file()]
    with explained(name):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.create_commit(
            name, operations, commit_message=message or "Model packed by usmlite", revision=revision
        )
    assert isinstance(done, CommitInfo)  # not a future: that has to be asked for
    return str(done.commit_url)


def prepare(
    source: str | Path, name: str, *, license_id: str | None = None, card: str | Path | None = None
) -> tuple[Path, str]:
    """Checks what would be pushed: the packed model's directory, and the text of the card.

    Args and errors as of `push`; nothing is sent.
    """
    path = Path(source)
    run = path if (path / RECIPE_FILE).is_file() else path.parent
    packed = path / PACKED_FOLDER if (path / PACKED_FOLDER).is_dir() else path
    if not is_packed(packed):
        raise ModelError(
            "this is no packed model", where=path, expected=f"{CONFIG_NAME} and {WEIGHTS_NAME} of usmlite",
            remedy="Give what `usmlite compress` wrote: DIR or DIR/packed.",
        )  # fmt: skip
    recognizer = load(packed)  # reads and checks every byte
    if card is not None:
        return packed, _text(Path(card))
    # A folder that lies beside a report is not yet what the report is about.
    report = _report(run / REPORT_FILE) if packed == run / PACKED_FOLDER else None
    if report is not None and report.get("packed_bytes") != recognizer.weights_bytes:
        raise ModelError(
            "the report is about another model", where=run / REPORT_FILE,
            expected=f"{recognizer.weights_bytes} packed bytes", found=report.get("packed_bytes"),
            remedy="Finish the run, or give the packed directory alone, copied elsewhere.",
        )  # fmt: skip
    text = model_card(
        name,
        language=recognizer.adapter.only_language,
        weights_bytes=recognizer.weights_bytes,
        format_version=read_manifest(packed).format_version,
        report=report,
        license_id=license_id,
    )
    return packed, text


def _report(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise UsmliteError("this is no report", where=path, found=error) from error
    return found if isinstance(found, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsmliteError("cannot be read", where=path, found=error) from error

"""Models on the Hugging Face hub, found by name and revision; and what its refusals mean.

Tokens, caches, proxies and other addresses (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, ...) are those of
`huggingface_hub`, which does the talking.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from usmlite.errors import ModelError
from usmlite.packfile import CONFIG_NAME, PROCESSOR_FILES, WEIGHTS_NAME, is_packed

# As huggingface_hub has it; "@" and a revision may follow.
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What `huggingface_hub` raises: its own, those of the HTTP client it uses (two, over the years), and a
# RuntimeError where a file could not be uploaded.
_ERRORS = (
    errors.HTTPError,  # type: ignore[attr-defined]  # is there, but not declared
    HFValidationError, EntryNotFoundError, LocalTokenNotFoundError, OSError, ValueError, RuntimeError,
)  # fmt: skip
# Of a dense model. Pickled weights are never opened, so they need not come.
_DENSE = ["*.json", "*.txt", "*.model", "*.safetensors"]


def parse(source: str | Path) -> tuple[str, str | None] | None:
    """The name and the revision out of "USER/NAME" or "USER/NAME@REVISION"; None if it is neither."""
    if not isinstance(source, str) or Path(source).exists():
        return None
    found = _NAME.fullmatch(source)
    return None if found is None else (found["name"], found["revision"])


def fetch_packed(name: str, revision: str | None) -> Path | None:
    """Downloads a packed model, unless it is in the cache.

    Args:
        name: "USER/NAME".
        revision: a branch, a tag or a commit; None for the main branch.

    Returns:
        Its directory in the cache; None if the repository holds something else, or cannot be asked.
    """
    try:
        config = Path(hf_hub_download(name, CONFIG_NAME, revision=revision))
    except _ERRORS:
        return None
    if not is_packed(config.parent):
        return None
    # The commit that was looked at, should the branch move meanwhile.
    with explained(name):
        files = [CONFIG_NAME, WEIGHTS_NAME, *PROCESSOR_FILES]
        return Path(snapshot_download(name, revision=config.parent.name, allow_patterns=files))


def fetch_dense(name: str, revision: str) -> Path:
    """Downloads one revision of a dense model, unless it is in the cache; its directory there.

    Raises:
        ModelError: there is no such model or revision, or the hub cannot be reached.
    """
    with explained(f"{name}@{revision}"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DENSE))


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns what `huggingface_hub` raises inside into one clear error."""
    try:
        yield
    except _ERRORS as error:
        raise _refusal(where, error) from error


def _refusal(where: str, error: Exception) -> ModelError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    found = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, HFValidationError):
        return ModelError(
            "this is no name for the hub", where=where, expected="USER/NAME of letters, digits, - _ and .",
            found=found,
        )  # fmt: skip
    if isinstance(error, RevisionNotFoundError):
        return ModelError(
            "the hub has no such revision", where=where, remedy="Name a branch, a tag or a commit of it."
        )
    if isinstance(error, (LocalTokenNotFoundError, GatedRepoError)) or status in (401, 403):
        return ModelError(
            "the hub does not let you do this", where=where, found=found,
            remedy="Log in with `hf auth login`, or set HF_TOKEN, with a token that may do it; of a gated "
            "model, ask for access on its page.",
        )  # fmt: skip
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            "the hub has no such model", where=where,
            remedy="Check the name; a private one needs `hf auth login` or HF_TOKEN.",
        )  # fmt: skip
    if isinstance(error, HfHubHTTPError) and status is not None:
        return ModelError("the hub refuses", where=where, found=found, remedy="Try again later.")
    return ModelError(
        "the hub cannot be reached", where=where, found=found,
        remedy="Check the connection, HF_ENDPOINT, and that HF_HUB_OFFLINE is not set.",
    )  # fmt: skip

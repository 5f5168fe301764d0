"""Labels for a new CTC head, out of the transcripts: characters or word pieces, as a tokenizer's files.

Label 0 is the blank. Everything is in lower case, without punctuation but apostrophes.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ParakeetTokenizer, Wav2Vec2CTCTokenizer

from usmlite.errors import DataError

BLANK, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
_APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ`"), "'")  # noqa: RUF001


def plain(text: str) -> str:
    """A text in lower case, its words separated by one space, without punctuation but apostrophes."""
    lower = text.lower().translate(_APOSTROPHES)
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in lower)
    return " ".join("".join(kept).split())


def characters(texts: Iterable[str]) -> Wav2Vec2CTCTokenizer:
    """A tokenizer of the letters, digits and apostrophes that the texts have, and the space.

    Raises:
        DataError: they have none.
    """
    found = sorted({character for text in texts for character in plain(text)} - {" "})
    _check(found)
    labels = {token: number for number, token in enumerate((BLANK, SPACE, *found, UNKNOWN))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(labels), encoding="utf-8")
        # Marks for the beginning and the end would only be labels that no text gets.
        tokenizer = cast(Any, Wav2Vec2CTCTokenizer)(
            str(path), bos_token=cast(Any, None), eos_token=cast(Any, None), pad_token=BLANK,
            unk_token=UNKNOWN, word_delimiter_token=SPACE,
        )  # fmt: skip
    return cast(Wav2Vec2CTCTokenizer, tokenizer)


def pieces(texts: Sequence[str], size: int) -> ParakeetTokenizer:
    """A tokenizer of word pieces trained on the texts (byte-pair encoding, "▁" for the space before a word).

    Args:
        texts: what to train on.
        size: labels, at least one for each character; fewer where the texts have no more pairs.

    Raises:
        DataError: the texts have no letters, or more different ones than labels.
    """
    lines = [plain(text) for text in texts]
    letters = sorted({character for line in lines for character in line} - {" "})
    _check(letters)
    if len(letters) + 3 > size:
        raise DataError(
            "too few word pieces for the letters of the transcripts",
            where="--vocabulary-size",
            expected=f"at least {len(letters) + 3}",
            found=size,
        )
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BLANK, UNKNOWN],
        show_progress=False,
        initial_alphabet=["▁", *letters],
    )
    backend.train_from_iterator(lines, trainer)
    made = cast(Any, ParakeetTokenizer)(tokenizer_object=backend, pad_token=BLANK, unk_token=UNKNOWN)
    return cast(ParakeetTokenizer, made)


def labels_of(tokenizer: Any) -> int:
    """How many labels a head for this tokenizer needs: up to the last that a text may get."""
    unused = set(tokenizer.all_special_ids) - {tokenizer.pad_token_id}
    space = getattr(tokenizer, "word_delimiter_token_id", None)
    used = [n for n in tokenizer.get_vocab().values() if n not in unused or n == space]
    return int(max(used)) + 1


def _check(letters: Sequence[str]) -> None:
    if not letters:
        raise DataError(
            "the transcripts have no letters",
            where="data.train",
            expected="texts to make a vocabulary of",
            remedy="Name speech with transcripts.",
        )

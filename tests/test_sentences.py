import re

from usmlite.sentences import FREE, PATTERNS, split_sentences


def test_sets_share_no_sentence() -> None:
    counts = {"train": 480, "dev": 24, "test": 72}
    sets = split_sentences(counts)
    assert {name: len(texts) for name, texts in sets.items()} == counts
    everything = [text for texts in sets.values() for text in texts]
    assert len(set(everything)) == len(everything)
    # Each set has some that no pattern made.
    assert all(set(texts) & set(FREE) for texts in sets.values())


def test_same_seed_same_sentences() -> None:
    assert split_sentences({"a": 50}) == split_sentences({"a": 50})
    assert split_sentences({"a": 50}) != split_sentences({"a": 50}, seed=1)


def test_small_sets_and_large_ones() -> None:
    assert split_sentences({"none": 0, "one": 1}) == {"none": [], "one": split_sentences({"one": 1})["one"]}
    assert len(set(split_sentences({"many": 3000})["many"])) == 3000


def test_sentences_are_plain_words() -> None:
    texts = split_sentences({"all": 2000})["all"] + list(FREE)
    for text in texts:
        assert re.fullmatch(r"[A-Z][A-Za-z ,]+[.?]", text), text
        assert "  " not in text
    assert len(set(FREE)) == len(FREE)
    assert all(pattern.count("{}") == len(slots) for pattern, slots in PATTERNS)

"""Text becomes tokens and comes back, and special tokens are where the data expect them."""

import json
import sys

import pytest

pytest.importorskip("tokenizers")

from hypothesis import given
from hypothesis import strategies as st

from kuosan.tokenizer import PAD, UNKNOWN, Tokenizer


@pytest.fixture(scope="module")
def words():
    """Counts: the 3, cat 2, sat 2, and a, dog's, long-haired and the marks once."""
    return Tokenizer.train(["The cat sat.", "the CAT, a long-haired", "the dog's (sat)!"], "word", 100)


BYTES = Tokenizer.train(["low lower lowest", "newer newest"], "bpe", 270)


def test_words_are_numbered_by_frequency_and_then_by_alphabet(words):
    """Counted by hand; the two special tokens come first."""
    assert words.encode("the cat sat") == [2, 3, 4]
    assert (PAD, UNKNOWN) == (0, 1)
    assert words.size == 2 + len(["the", "cat", "sat", "a", "long-haired", "dog's", *".,()!"])


def test_apostrophes_hyphens_and_decimals_stay_inside_words():
    """Split by hand."""
    text = "Don't re-use John’s 3.5 or 1,000, players' end-"
    tokens = ["don't", "re-use", "john’s", "3.5", "or", "1,000", ",", "players", "'", "end", "-"]
    tokenizer = Tokenizer.train([text], "word", 100)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == tokens


def test_a_small_vocabulary_keeps_the_most_frequent_words():
    tokenizer = Tokenizer.train(["b b b a a c"], "word", 4)
    assert tokenizer.size == 4
    assert tokenizer.decode(tokenizer.encode("a b c A zebra")) == "a b <unk> a <unk>"


@pytest.mark.parametrize(
    "text",
    [
        "the cat (a dog), sat: here; there!",
        'he said "the end" and "more".',
        "50% of $5, either/or [see `x']",
        "a — b - c",
    ],
)
def test_punctuation_clings_to_the_side_where_english_has_it(text):
    """Lower-case English with ordinary punctuation survives the way to tokens and back."""
    tokenizer = Tokenizer.train([text], "word", 100)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_byte_pairs_give_back_any_text(text):
    """Hypothesis' strings, of any characters, most of them never seen; none begins with a special token."""
    assert BYTES.decode(BYTES.encode(text)) == text
    assert not {PAD, UNKNOWN} & set(BYTES.encode(text))


def test_byte_pairs_merge_what_is_frequent():
    """3 special tokens, 256 bytes, 11 merges; "low" is one token, so the word costs less than its letters."""
    assert BYTES.size == 270
    assert len(BYTES.encode("low")) == 1
    assert len(BYTES.encode("xyz")) == 3


def test_characters_keep_lines_and_case():
    text = "春眠不觉晓，\nAb a\t"
    tokenizer = Tokenizer.train([text], "character", 100)
    assert tokenizer.size == 2 + len(set(text))
    assert tokenizer.encode("觉晓") == [*tokenizer.encode("觉"), *tokenizer.encode("晓")]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("龙") == [UNKNOWN]


def test_decoding_stops_at_padding(words):
    assert words.decode([2, 3, PAD, 4]) == "the cat"
    assert words.decode([]) == words.decode([PAD]) == ""


@pytest.mark.parametrize("kind", ["word", "bpe", "character"])
def test_a_text_that_spells_a_special_token_is_ordinary_text(kind, tmp_path):
    """Before and after saving."""
    tokenizer = Tokenizer.train(["a <unk> b <pad>", "<unk> <pad>"] * 5, kind, 300)
    tokenizer.save(tmp_path / "t.json")
    for one in (tokenizer, Tokenizer.load(tmp_path / "t.json")):
        assert not {PAD, UNKNOWN} & set(one.encode("a <unk> b <pad>"))


@pytest.mark.parametrize("kind", ["word", "bpe", "character"])
def test_a_saved_tokenizer_is_the_same(kind, tmp_path):
    tokenizer = Tokenizer.train(["Ein Hund, 中文!"], kind, 300)
    tokenizer.save(tmp_path / "t.json")
    again = Tokenizer.load(tmp_path / "t.json")
    assert (again.kind, again.size) == (kind, tokenizer.size)
    for text in ("Ein Hund, 中文!", "Zwei Hunde"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.encode_all(["Hund", "!"]) == [again.encode("Hund"), again.encode("!")]


def test_a_file_that_is_no_tokenizer_is_an_error(words, tmp_path):
    file = tmp_path / "t.json"
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(file)
    words.save(file)
    whole = json.loads(file.read_text())
    for broken in ("{", "[1]", "{}", json.dumps({**whole, "kind": "x"}), json.dumps({**whole, "tokenizer": {}})):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"t\.json is not a tokenizer saved by"):
            Tokenizer.load(file)
    whole["tokenizer"]["model"]["vocab"] = {"<unk>": 0, "<pad>": 1}
    whole["tokenizer"]["added_tokens"] = []
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="lacks the special tokens"):
        Tokenizer.load(file)


@pytest.mark.parametrize(
    ("texts", "kind", "size", "words"),
    [
        (["a"], "letter", 10, "kind must be one of word, bpe, character, got 'letter'"),
        (["a"], "word", 2, "size of at least 3 tokens, got 2"),
        (["a"], "bpe", 257, "size of at least 258 tokens, got 257"),
        ([" ", "\n"], "word", 10, "empty or white space"),
        ([], "character", 10, "empty or white space"),
    ],
)
def test_training_that_cannot_be_says_why(texts, kind, size, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer.train(texts, kind, size)


def test_an_id_that_is_not_in_the_vocabulary_is_an_error(words):
    """Such as the mask, which a model adds behind the vocabulary."""
    for bad in (-1, words.size):
        with pytest.raises(ValueError, match=f"id {bad} is not in this vocabulary"):
            words.decode([3, bad])


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'kuosan\[text\]'"):
        Tokenizer.train(["a"])

"""Texts come in as padded tokens, split once and for all, and what was done to them is said."""

import csv
import json
import time

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

import kuosan.text.data as data_module
from kuosan.text.data import glosses, load, poems


def write(tmp_path, name, content):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def every_text(data):
    return [*data.train.texts, *data.held_out.texts]


def noted(data, words):
    return [note for note in data.notes if words in note]


NUMBERS = [f"this is line {n}" for n in range(40)]


def test_the_split_is_the_stated_permutation(tmp_path):
    """numpy's permutation; 5 % of 40 are 2, and the training part keeps the order of the file."""
    data = load(write(tmp_path, "a.txt", "\n".join(NUMBERS)), length=6)
    last = np.random.default_rng(0).permutation(40)[-2:]
    assert set(data.held_out.texts) == {NUMBERS[i] for i in last}
    assert list(data.train.texts) == [line for i, line in enumerate(NUMBERS) if i not in last]
    assert data.classes is data.train.labels is data.held_out.labels is None
    assert (data.name, data.length, data.tokenizer.kind) == ("a", 6, "word")


def test_tokens_are_padded_after_the_text(tmp_path):
    """By hand: ids go by frequency, a 2, b 3; whichever line is held out, its words are known from the others."""
    data = load(write(tmp_path, "a.txt", "a a b\n\r\n  a b\na a\nb a\n"), length=3)
    rows = {}
    for part in (data.train, data.held_out):
        assert part.tokens.dtype == part.lengths.dtype == torch.int64
        assert len(part) == len(part.texts)
        rows |= dict(zip(part.texts, zip(part.tokens.tolist(), part.lengths.tolist(), strict=True), strict=True))
    assert rows == {"a a b": ([2, 2, 3], 3), "a b": ([2, 3, 0], 2), "a a": ([2, 2, 0], 2), "b a": ([3, 2, 0], 2)}
    assert data.notes[0] == "1 empty texts were left out"


def test_the_vocabulary_is_learned_from_the_training_part_alone(tmp_path):
    """Each line has a word of its own, which only the held-out ones do not know: 2 of 8 tokens."""
    data = load(write(tmp_path, "a.txt", "\n".join(NUMBERS)), length=6)
    assert (data.held_out.tokens == 1).sum(dim=1).tolist() == [1, 1]
    assert not (data.train.tokens == 1).any()
    assert noted(data, "25.0% of the held-out tokens are unknown to the vocabulary of 43")
    assert noted(data, "0.0% of the training tokens are unknown")


def test_a_training_text_that_is_also_held_out_is_dropped(tmp_path):
    """Every line twice: the twin of each held-out line would be in the training part."""
    data = load(write(tmp_path, "a.txt", "\n".join(NUMBERS * 2)), length=6)
    assert len(data.held_out) == 4
    assert not set(data.train.texts) & set(data.held_out.texts)
    dropped = 80 - len(data.train) - 4
    assert dropped >= 1
    assert noted(data, f"{dropped} texts to train on that are also held out were dropped")


def test_a_table_has_texts_and_classes_in_the_named_columns(tmp_path):
    """The same rows as CSV, with a line end inside a text, and as JSON lines, one line of them empty."""
    rows = [(f'he said "{n}",\nthen left', "even" if n % 2 == 0 else "odd") for n in range(40)]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("what", "id", "class"), *((text, 7, name) for text, name in rows)])
    lines = [json.dumps({"class": name, "what": text}) for text, name in rows]
    write(tmp_path, "a.jsonl", "\n\n".join(lines))
    for name in ("a.csv", "a.jsonl"):
        data = load(tmp_path / name, length=12, text="what", label="class", held_out=0.25)
        assert data.classes == ("even", "odd")
        assert len(data.held_out) == 10
        for part in (data.train, data.held_out):
            assert [(t, data.classes[i]) for t, i in zip(part.texts, part.labels.tolist(), strict=True)] == [
                row for row in rows if row[0] in part.texts
            ]
        assert load(tmp_path / name, length=12, text="what").classes is None


def test_classes_that_are_numbers_or_truth_values_go_by_their_names(tmp_path):
    rows = [{"text": f"line {n}", "good": n % 2 == 0} for n in range(6)]
    data = load(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))), length=4, label="good")
    assert data.classes == ("False", "True")


def test_sub_folders_are_classes(tmp_path):
    """One nested; hidden files and other kinds of files are passed over."""
    for n in range(4):
        write(tmp_path, f"f/sea/deep/{n}.txt", f"the sea\nhas {n}")
        write(tmp_path, f"f/air/{n}.TXT", f"the air has {n}")
    for name in ("f/.git/a.txt", "f/air/.b.txt", "f/notes.md"):
        write(tmp_path, name, "hidden")
    data = load(tmp_path / "f", length=9)
    assert data.classes == ("air", "sea")
    assert len(every_text(data)) == 8
    for part in (data.train, data.held_out):
        assert [text[4:7] for text in part.texts] == [data.classes[i] for i in part.labels]


def test_a_folder_of_texts_or_of_one_folder_of_texts_has_no_classes(tmp_path):
    for n in range(4):
        write(tmp_path, f"f/g/{n}.txt", f"number {n}")
    for root in (tmp_path / "f", tmp_path / "f" / "g"):
        data = load(root, length=4)
        assert data.classes is data.train.labels is None
        assert sorted(every_text(data)) == [f"number {n}" for n in range(4)]
    write(tmp_path, "f/here.txt", "number 5")
    with pytest.raises(ValueError, match="1 texts itself and others in sub-folders"):
        load(tmp_path / "f", length=4)


@pytest.mark.parametrize(("kind", "cut"), [("word", 1), ("character", 41), ("bpe", None)])
@pytest.mark.parametrize("line", ["word " * 20_000, "x" * 99_994 + " of 5", "!?" * 50_000])
def test_a_line_of_100_000_characters_is_cut_quickly_and_that_is_said(tmp_path, kind, cut, line):
    """The other 40 lines have 4 words, and more than 4 characters; the second long one is of 3 words."""
    file = write(tmp_path, "a.txt", "\n".join([*NUMBERS, line]))
    start = time.process_time()
    data = load(file, length=4, kind=kind, held_out=0.5)
    assert time.process_time() - start < 5
    assert data.train.tokens.shape[1] == data.held_out.tokens.shape[1] == 4
    assert line.strip() in every_text(data)
    found = sum(int(note.split()[0]) for note in noted(data, "were cut to 4 tokens"))
    assert found >= 1 if cut is None else found == cut - (kind == "word" and "of" in line)


def test_a_link_to_a_folder_of_texts_is_passed_over(tmp_path):
    """A link to a text is one more text."""
    for name in ("f/a.txt", "f/b.txt", "elsewhere/c.txt"):
        write(tmp_path, name, f"the text of {name[-5]}")
    (tmp_path / "f" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f" / "d.txt").symlink_to(tmp_path / "elsewhere" / "c.txt")
    assert sorted(every_text(load(tmp_path / "f", length=4))) == [f"the text of {x}" for x in "abc"]


def test_a_byte_order_mark_and_foreign_line_ends_are_no_text(tmp_path):
    data = load(write(tmp_path, "a.txt", b"\xef\xbb\xbfone two\r\ntwo one\rone one\r\n"), length=3)
    assert sorted(every_text(data)) == ["one one", "one two", "two one"]


BAD = {
    "empty": ("a.txt", "", {}, "two texts are needed.*it has 0"),
    "white space": ("a.txt", " \n\t\n", {}, "two texts are needed.*it has 0"),
    "one line": ("a.txt", "one line only", {}, "two texts are needed, one to train on and one to hold out; it has 1"),
    "all the same": ("a.txt", "same\nsame\nsame", {}, "all texts to train on are held out too"),
    "unknown words": ("a.txt", "one two\nthree four", {}, "all held-out tokens are unknown"),
    "encoding": ("a.txt", "ok\nna\xefve\n".encode("latin-1"), {}, r"byte 5 \(0xef\), in line 2, is not UTF-8"),
    "UTF-16": ("a.txt", "ok\nok".encode("utf-16"), {}, r"byte 0 \(0xff\), in line 1, is not UTF-8"),
    "kind of file": ("a.pdf", "x", {}, r"unknown kind: expected \.txt, \.csv, \.jsonl, or a folder"),
    "label of lines": ("a.txt", "a\nb", {"label": "x"}, "has no columns, so label='x' means nothing"),
    "text column": ("a.csv", "body,kind\na,b\n", {}, "has no column 'text'; it has body, kind"),
    "label column": ("a.csv", "text,kind\na,b\n", {"label": "class"}, "has no column 'class'; it has text, kind"),
    "no columns": ("a.csv", "", {}, "has no column 'text'; it has none"),
    "one class": ("a.csv", "text,c\na,x\nb,x\n", {"label": "c"}, "'c' is 'x' in every row"),
    "no class": ("a.csv", "text,c\na,x\nb\n", {"label": "c"}, "line 3 has no 'c'"),
    "a huge field": ("a.csv", "text\n" + "x" * 200_000, {}, "after line 1 it is not CSV: field larger"),
    "JSON": ("a.jsonl", '{"text": "a"}\n\n{"text": b}\n', {}, "line 3 is not JSON: Expecting value at column 10"),
    "JSON list": ("a.jsonl", '["a"]', {}, "line 1 is not an object with a string under 'text'"),
    "JSON key": ("a.jsonl", '{"text": "a"}\n{"txt": "a"}', {}, "line 2 is not an object with a string under 'text'"),
    "JSON number": ("a.jsonl", '{"text": 3}', {}, "line 1 is not an object with a string under 'text'"),
    "JSON class": ("a.jsonl", '{"text": "a"}', {"label": "c"}, "line 1 has no 'c'"),
    "length": ("a.txt", "a b\na", {"length": 0}, "^length must be at least 1"),
    "share": ("a.txt", "a b\na", {"held_out": 1.0}, "^held_out must lie between 0 and 1"),
    "kind": ("a.txt", "a b\na", {"kind": "words"}, "^kind must be one of word, bpe, character"),
    "size": ("a.txt", "a b\na", {"size": 2}, "needs a size of at least 3"),
}


@pytest.mark.parametrize(("name", "content", "how", "words"), BAD.values(), ids=BAD.keys())
def test_texts_that_cannot_be_used_say_why(tmp_path, name, content, how, words):
    with pytest.raises(ValueError, match=words):
        load(write(tmp_path, name, content), **{"length": 4, **how})


def test_a_path_without_texts_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing at .*nowhere"):
        load(tmp_path / "nowhere", length=4)
    write(tmp_path, "f/a.md", "no text")
    with pytest.raises(ValueError, match=r"holds no texts: expected files that end in \.txt"):
        load(tmp_path / "f", length=4)


WORDNET = """\
  1 This software and database is being provided to you, the LICENSEE, by
  2 Princeton | University under the following license.
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | a thing of no kept class at all
00001741 05 n 01 cat 0 001 @ 00001740 n 0000 | a small animal; it purrs; "the cat sat; it did"; "no cats"
00001742 20 n 01 oak 0 001 @ 00001740 n 0000 | a tall tree (with acorns)
00001743 13 n 01 bun 0 001 @ 00001740 n 0000 | sweet bread
"""


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A folder laid out like the package: nouns as above, then 17 animals, and verbs."""
    more = [f"0000{n} 05 n 01 x 0 000 | an animal of kind {'abcdefghijklmnopq'[n]}" for n in range(17)]
    write(tmp_path, "wordnet-base/usr/share/wordnet/data.noun", WORDNET + "".join(f"{line}  \n" for line in more))
    verbs = ["move on foot", " ".join(["word"] * 19) + "!!", " ".join(["word"] * 20)]
    lines = [f"0000{n} {29 + n} v 01 y 0 000 01 + 02 00 | {gloss}  \n" for n, gloss in enumerate(verbs)]
    write(tmp_path, "wordnet-base/usr/share/wordnet/data.verb", "".join(lines))
    monkeypatch.setattr(data_module, "fetch", lambda name: {"glosses": tmp_path}[name])


def test_glosses_are_definitions_of_three_to_nineteen_words_with_their_class(wordnet):
    """Counted by hand: 3 + 17 nouns of the kept classes and 3 verbs, of which one is too short and one too long."""
    data = glosses()
    class_of = {}
    for part in (data.train, data.held_out):
        class_of |= dict(zip(part.texts, (data.classes[i] for i in part.labels), strict=True))
    assert len(class_of) == 21
    assert class_of["a small animal"] == "animal"
    assert class_of["a tall tree"] == "plant"
    assert class_of["move on foot"] == "verb"
    assert class_of[" ".join(["word"] * 19)] == "verb"
    assert data.notes[0] == "2 of 23 glosses, not of 3 to 19 words, were left out"
    assert (data.length, data.train.tokens.shape[1], len(data.held_out)) == (20, 20, 1)
    assert data.licence == "WordNet-3.0"
    assert "wordnet-base" in data.source


def poem(title, lines):
    return "\n".join([f"\x1b[32m《{title}》\x1b[m", "\x1b[33m作者：某人\x1b[m", *lines])


@pytest.fixture
def tang(tmp_path, monkeypatch):
    """Four poems of four lines of six characters, and one of nine lines of sixteen, three after an empty one."""
    short = [poem(f"短{n}", [f"{a}来见月明。" for a in "春夏秋冬"]) + "\n" for n in range(4)]
    long = [f"{a}去江湖多风波，舟楫恐失坠今朝。" for a in "一二三四五六七八九"]
    content = "%\n".join([*short, poem("长", [*long[:6], "", *long[6:]]) + "\n"]) + "%\n"
    folder = "fortunes-zh/usr/share/games/fortunes/tang300"
    write(tmp_path, folder, content)
    monkeypatch.setattr(data_module, "fetch", lambda name: {"tang-poems": tmp_path}[name])
    return long


def test_poems_are_characters_without_title_and_author(tang):
    """Lines of 16: pieces of four, four and one fit into 64; the four short poems are the same text."""
    data = poems()
    short = "春来见月明。夏来见月明。秋来见月明。冬来见月明。"
    pieces = ["".join(tang[:4]), "".join(tang[4:8]), tang[8]]
    assert set(every_text(data)) <= {short, *pieces}
    assert (data.length, data.classes, data.tokenizer.kind) == (64, None, "character")
    assert noted(data, "1 of 5 poems, longer than 64 characters, were cut into pieces")
    assert noted(data, "titles and authors")
    assert data.train.lengths.max() == 64
    for row, text in zip(data.train.tokens, data.train.texts, strict=True):
        assert data.tokenizer.decode(row) == text


def test_all_pieces_of_a_poem_are_held_out_together(tang, monkeypatch):
    """With a permutation that puts the long poem, the fifth, last."""

    class InOrder:
        def permutation(self, count):
            return np.arange(count)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: InOrder())
    data = poems()
    assert len(data.held_out) == 3
    assert set(data.held_out.texts) == {"".join(tang[:4]), "".join(tang[4:8]), tang[8]}

"""Captions come in with their pictures, what is missing is said, and held out is what was promised."""

import bz2
import hashlib
import json
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from kuosan.fetch import cache_folder
from kuosan.image import characters as chinese
from kuosan.image import emoji as pictographs
from kuosan.image.captions import CAPTIONED, folder, has_captions
from kuosan.image.characters import ATTRIBUTES, RADICALS, attributes_of, gloss, held_out_combinations, unseen

CACHE = cache_folder()  # with the data as they are, if they were fetched


def have(name):
    return pytest.mark.skipif(not (CACHE / name / "packages.sha256").is_file(), reason=f"{name} were not fetched")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder with a red picture, a green one in a sub-folder, and a blue one."""
    monkeypatch.setenv("KUOSAN_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for name, colour in {"red.png": (255, 0, 0), "sub/green.png": (0, 255, 0), "blue.jpg": (0, 0, 255)}.items():
        Image.new("RGB", (8, 8), colour).save(root / name)
    return root


def written(root, content, name="metadata.csv"):
    (root / name).write_text(content, encoding="utf-8")
    return root


def by_caption(data):
    """Which channel of each image is the brightest, by its caption."""
    parts = (data.train, data.held_out)
    pairs = [pair for part in parts for pair in zip(part.captions, part.levels, strict=True)]
    return {caption: int(image.flatten(1).float().mean(1).argmax()) for caption, image in pairs}


WHOLE = {"a red one": 0, "a green one, in a sub-folder": 1, "blue": 2}
CSV = 'file_name,text\nred.png,a red one\n./sub/green.png,"a green  one,\nin a sub-folder"\nblue.jpg,blue\n'
JSONL = (
    '{"file_name": "red.png", "text": "a red one", "stars": 5}\n\n'
    '{"file_name": "sub/green.png", "text": "a green one, in a\\nsub-folder"}\n'
    '{"file_name": "blue.jpg", "text": "blue"}'
)


@pytest.mark.parametrize(
    ("name", "content"), [("metadata.csv", CSV), ("metadata.csv", "\ufeff" + CSV), ("metadata.jsonl", JSONL)]
)
def test_captions_of_a_metadata_file_come_with_their_pictures(pictures, name, content):
    """The same three pictures, by hand; white space becomes single spaces."""
    data = folder(written(pictures, content, name), 4, held_out=0.3)
    assert by_caption(data) == WHOLE
    assert data.classes is data.train.labels is data.held_out.labels is None
    assert (data.shape, data.level_count, data.source) == ((3, 4, 4), 256, str(pictures))
    assert data.notes[-1] == f"captions are from {name}"
    assert not any("left out" in note for note in data.notes)


def test_captions_of_text_files_come_with_the_pictures_beside_them(pictures):
    """Two pictures of one name share it."""
    Image.new("RGB", (8, 8), "red").save(pictures / "red.gif")
    for text, name in zip(WHOLE, ("red.txt", "sub/green.TXT", "blue.txt"), strict=True):
        written(pictures, text + "\n", name)
    data = folder(pictures, 4)
    assert by_caption(data) == WHOLE
    assert len(data.train) + len(data.held_out) == 4
    assert data.notes[-1] == "captions are from .txt files"


def test_text_files_do_not_count_beside_a_metadata_file(pictures):
    """The documented order."""
    data = folder(written(written(pictures, CSV), "crimson", "red.txt"), 4)
    assert by_caption(data) == WHOLE


def test_another_column_can_have_the_captions_and_images_can_be_grey(pictures):
    """As `text` says."""
    data = folder(written(pictures, CSV.replace("text", "alt", 1)), 4, channels=1, text="alt")
    assert set(by_caption(data)) == set(WHOLE)
    assert data.shape == (1, 4, 4)


def test_what_has_no_caption_or_no_picture_is_left_out_counted_and_named(pictures):
    """One picture without a line, one with an empty caption; twelve captions of pictures that are not there."""
    Image.new("RGB", (8, 8), "white").save(pictures / "white.png")
    lost = "".join(f"lost{number:02},was there\n" for number in range(12))
    data = folder(written(pictures, f"file_name,text\nred.png,red\nblue.jpg, \nsub/green.png,green\n{lost}"), 4)
    assert by_caption(data) == {"red": 0, "green": 1}
    assert data.notes[1:3] == (
        "2 pictures have no caption and were left out: blue.jpg, white.png",
        f"12 captions have no picture and were left out: {', '.join(f'lost{n:02}' for n in range(10))} and 2 more",
    )


def test_text_files_beside_no_picture_are_named(pictures):
    """A README among them."""
    for name in ("red", "blue", "README"):
        written(pictures, name, f"{name}.txt")
    data = folder(pictures, 4)
    assert by_caption(data) == {"red": 0, "blue": 2}
    assert "1 pictures have no caption and were left out: sub/green.png" in data.notes
    assert "1 captions have no picture and were left out: README.txt" in data.notes


BAD = {
    "twice": ("metadata.csv", "file_name,text\nred.png,a\n./red.png,a\n", r"line 3 names red.png, which line 2 named"),
    "outside": ("metadata.csv", "file_name,text\nred.png,a\nsub/../../x.png,b\n", r"line 3 names sub/\.\./\.\./x.png"),
    "absolute": ("metadata.csv", "file_name,text\n/red.png,a\n", r"line 2 names /red.png: expected a path inside"),
    "a drive": ("metadata.csv", "file_name,text\nC:/red.png,a\n", r"line 2 names C:/red.png: expected a path inside"),
    "no name": ("metadata.csv", "file_name,text\nred.png,a\n ,b\n", r"line 3 names no file"),
    "no column": ("metadata.csv", "file_name,label\nred.png,a\n", r"has no column 'text'; it has file_name, label"),
    "empty": ("metadata.csv", "", r"has no column 'file_name'; it has none"),
    "not UTF-8": ("metadata.csv", b"file_name,text\nred.png,caf\xe9\n", r"\(0xe9\), in line 2, is not UTF-8"),
    "not JSON": ("metadata.jsonl", '{"file_name": "red.png", "text": "a"}\n{"file_name": ', r"line 2 is not JSON: "),
    "no object": ("metadata.jsonl", '["red.png", "a"]', r'line 1: expected an object such as .*got \["red.png", "a"\]'),
    "no key": (
        "metadata.jsonl",
        '\n{"file_name": "red.png", "label": 3}',
        r"line 2 has no 'text'; it has file_name, l",
    ),
    "no text": ("metadata.jsonl", '{"file_name": "red.png", "text": 3}', r"line 1: expected text as 'text', got 3"),
    "JSON twice": ("metadata.jsonl", '{"file_name": "a", "text": "b"}\n' * 2, r"line 2 names a, which line 1 named"),
    "text not UTF-8": ("red.txt", b"\n\xff", r"red.txt: byte 1 \(0xff\), in line 2, is not UTF-8"),
    "no match": ("metadata.csv", "file_name,text\nRED.png,a\n", r"none of its 3 .* has captions of RED.png, which are"),
    "all null": (
        "metadata.jsonl",
        '{"file_name": "red.png", "text": null}',
        r"none of its 3 pictures \(such as blue.jp",
    ),
    "only one": ("metadata.csv", "file_name,text\nred.png,a\n", r"at least two readable pictures"),
}


@pytest.mark.parametrize(("name", "content", "says"), BAD.values(), ids=BAD.keys())
def test_captions_that_cannot_be_used_are_an_error_that_says_where(pictures, name, content, says):
    """Each by hand; the file is named, and the line."""
    (pictures / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as error:
        folder(pictures, 4)
    assert str(pictures) in str(error.value)


def test_two_metadata_files_or_none_are_an_error(pictures, tmp_path):
    """It would not be clear which to use."""
    with pytest.raises(ValueError, match=r"none of its 3 pictures .*expected metadata.csv or metadata.jsonl"):
        folder(pictures, 4)
    written(written(pictures, CSV), JSONL, "metadata.jsonl")
    with pytest.raises(ValueError, match=r"has metadata.csv and metadata.jsonl: only one"):
        folder(pictures, 4)
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        folder(tmp_path / "nowhere", 4)
    with pytest.raises(ValueError, match="held_out must lie between 0 and 1"):
        folder(pictures, 4, held_out=1)


def test_what_is_held_out_does_not_depend_on_the_captions_or_their_order(pictures):
    """The hash is of the picture's name."""
    names = [f"{number:03}.png" for number in range(100)]
    for number, name in enumerate(names):
        Image.new("L", (2, 2), number).save(pictures / name)
    before = folder(written(pictures, "file_name,text\n" + "".join(f"{n},{n}\n" for n in names)), 2, held_out=0.2)
    after = folder(
        written(pictures, "file_name,text\n" + "".join(f"{n},{n} b\n" for n in names[::-1])), 2, held_out=0.2
    )
    assert 10 <= len(before.held_out) <= 30
    assert [name.split()[0] for name in after.held_out.captions] == list(before.held_out.captions)
    assert torch.equal(before.held_out.levels, after.held_out.levels)


def test_whether_a_folder_has_captions(pictures, tmp_path):
    """A .txt file counts only beside a picture."""
    assert not has_captions(tmp_path / "nowhere")
    assert not has_captions(pictures / "red.png")
    assert not has_captions(pictures)
    assert not has_captions(written(pictures, "about these pictures", "README.txt"))
    assert has_captions(written(pictures, "green", "sub/green.txt"))
    (pictures / "sub" / "green.txt").unlink()
    assert has_captions(written(pictures, "", "metadata.jsonl"))


# Chinese characters

GLOSSES = {
    "river; stream; yellow river": "river",
    "ONE two three four five six seven": "one two three four five six",
    "(Cant.) to sip, to drink": "to sip",
    "cup (same as 杯 [U+676F] and 桮 [U+686E]); unhappy": "cup",
    "same as 單 U+55AE, single, individual": "single",
    "variant of U+8499 蒙": "",
    "(nested (brackets), dropped) left": "left",
    "an unclosed (bracket": "an unclosed bracket",
    "place in Héběi, China": "place in hebei",
    "“ping pong”; ball": "ping pong",
    "[?]": "",
    "deep. ; far": "deep",
}


@pytest.mark.parametrize(("definition", "meaning"), GLOSSES.items())
def test_a_gloss_is_what_a_definition_says_first(definition, meaning):
    """By hand, after real definitions."""
    assert gloss(definition) == meaning


def test_captions_say_what_they_should():
    """The example of the documentation; one stroke; no gloss."""
    assert chinese._caption("water", 8, "serif", "bold", "river") == "water radical, 8 strokes, serif, bold; river"
    assert chinese._caption("one", 1, "sans", "regular", "") == "one radical, 1 stroke, sans, regular"


def test_the_radicals_have_their_names_and_numbers():
    """Kangxi radicals 1, 85, 172 and 214, as any dictionary has them."""
    assert len(set(RADICALS)) == 214
    assert [RADICALS[number - 1] for number in (1, 85, 172, 214)] == ["one", "water", "short tailed bird", "flute"]


SAID = {
    "water radical, 8 strokes, serif, bold; river": [1, 1, 1, 0],
    "dragon radical, 1 stroke, sans, regular; bold, water radical, serif": [0, 0, 0, 20],
    "short tailed bird radical": [-1, -1, -1, 20],
    "A Bold SERIF character with the Stone radical and 16 strokes": [1, 1, 4, 19],
    "dragonfly radical, 0 strokes, sansa": [-1, -1, -1, -1],
    "": [-1, -1, -1, -1],
    "sans-serif; bold, stone radical": [0, -1, -1, -1],
}


def test_attributes_are_read_from_captions_and_from_prompts():
    """By hand: nothing is read after the first ";", and what is not said is -1."""
    assert attributes_of(list(SAID)).tolist() == list(SAID.values())
    assert attributes_of(list(SAID)).dtype == torch.int64
    assert attributes_of([]).shape == (0, 4)


def test_strokes_fall_into_the_buckets_that_their_names_say():
    """The edges."""
    edges = {1: 0, 5: 0, 6: 1, 8: 1, 9: 2, 11: 2, 12: 3, 15: 3, 16: 4, 48: 4}
    assert attributes_of([f"{strokes} strokes" for strokes in edges])[:, 2].tolist() == list(edges.values())


def test_a_caption_says_the_attributes_that_it_was_made_of():
    """Every combination there is, both ways."""
    strokes = {"up to 5": 5, "6 to 8": 6, "9 to 11": 11, "12 to 15": 12, "16 and more": 30}
    every = list(product(*ATTRIBUTES.values()))
    made = [chinese._caption("dragon" if r == "other" else r, strokes[s], t, w, "bold") for t, w, s, r in every]
    assert [
        tuple(values[i] for values, i in zip(ATTRIBUTES.values(), row, strict=True))
        for row in attributes_of(made).tolist()
    ] == every
    said = {words for words, out in zip(every, unseen(made), strict=True) if out}
    assert said == set(held_out_combinations())


def test_held_out_combinations_are_those_of_the_lowest_hashes():
    """SHA-256 as hashlib has it, and what fewer than four characters have is not among them."""
    few = {("fish", "9 to 11"), ("bamboo", "6 to 8"), ("gold", "up to 5")}
    assert few < chinese._TOO_FEW
    expected = set()
    for said in product(*ATTRIBUTES.values()):
        low = hashlib.sha256(", ".join(said).encode()).hexdigest() < f"{int(0.1 * 2**32):08x}"
        if low and said[3] != "other" and (said[3], said[2]) not in chinese._TOO_FEW:
            expected.add(said)
    assert set(held_out_combinations()) == expected
    assert 20 <= len(expected) <= 50


def test_each_value_alone_and_each_radical_with_each_number_of_strokes_can_be_seen():
    """Combinations are held out, never a value, nor all typefaces and weights of a radical and strokes."""
    held = set(held_out_combinations())
    seen = [said for said in product(*ATTRIBUTES.values()) if said not in held]
    for place, values in enumerate(ATTRIBUTES.values()):
        assert {said[place] for said in seen} == set(values)
    assert {said[2:] for said in seen} == set(product(ATTRIBUTES["strokes"], ATTRIBUTES["radical"]))


def test_a_caption_that_says_only_a_part_of_a_combination_is_not_unseen():
    """One combination that is held out, and the same with a word less."""
    assert ("serif", "bold", "6 to 8", "fire") in held_out_combinations()
    captions = ["fire radical, 7 strokes, serif, bold; hot", "fire radical, 7 strokes, serif", "serif, bold", ""]
    assert unseen(captions).tolist() == [True, False, False, False]
    assert unseen([]).shape == (0,)


SOURCES = """# Unihan_IRGSources.txt
#	kTotalStrokes
U+4E00	kIRG_GSource	G0-523B
U+4E00	kRSUnicode	1.0
U+4E00	kTotalStrokes	1
U+7070	kRSUnicode	86.2
U+7070	kTotalStrokes	6 16
U+8BED	kRSUnicode	149'.7 1.2
U+8BED	kTotalStrokes	9
U+9F98	kRSUnicode	212.0
U+9F98	kTotalStrokes	16
U+9FA0	kRSUnicode	214.5
U+9FA0	kTotalStrokes	22
U+3400	kRSUnicode	1.4
U+3400	kTotalStrokes	5
"""
READINGS = """U+8BED	kDefinition	language, words; saying
U+4E00	kDefinition	one; a, an; alone
U+4E00	kMandarin	yī
U+7070	kDefinition	ashes, dust
U+9FA0	kDefinition	not in the fonts
U+3400	kDefinition	(same as U+4E18 丘) hillock

"""


def font(path, letters, box, face):
    """A collection of `face` + 1 fonts of 1,000 units an em, in the last of which each letter is a box."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from fontTools.ttLib import TTCollection

    def glyph(left, bottom, right, top):
        pen = TTGlyphPen(None)
        pen.moveTo((left, bottom))
        for corner in ((left, top), (right, top), (right, bottom)):
            pen.lineTo(corner)
        pen.closePath()
        return pen.glyph()

    def made(letters, box):
        one = builder(1000, isTTF=True)
        one.setupGlyphOrder([".notdef", "box"])
        one.setupCharacterMap(dict.fromkeys(map(ord, letters), "box"))
        one.setupGlyf({".notdef": glyph(400, 400, 600, 600), "box": glyph(*box)})
        one.setupHorizontalMetrics({".notdef": (1000, 0), "box": (1000, box[0])})
        one.setupHorizontalHeader(ascent=1160, descent=-320)  # as those of Noto CJK
        one.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
        one.setupOS2()
        one.setupPost()
        return one.font

    collection = TTCollection()
    collection.fonts = [made("x", (0, 0, 1, 1)) for _ in range(face)] + [made(letters, box)]
    collection.save(path)


BOXES = {
    ("sans", "regular"): (0, -120, 1000, 880),
    ("sans", "bold"): (0, 380, 1000, 880),
    ("serif", "regular"): (0, -120, 500, 880),
    ("serif", "bold"): (0, 380, 500, 880),
}


@pytest.fixture
def few_characters(tmp_path, monkeypatch):
    """The folder of the data set with four characters, each a box of the em, or of a half or quarter of it."""
    monkeypatch.setenv("KUOSAN_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "chinese-characters"
    fonts = root / "fonts-noto-cjk/usr/share/fonts/opentype/noto"
    tables = root / "unicode-data/usr/share/unicode"
    for place in (fonts, tables):
        place.mkdir(parents=True)
    for (typeface, weight), box in BOXES.items():
        letters = "一灰语龘" + ("\u9fa0" if typeface == "sans" else "")
        font(fonts / f"Noto{typeface.title()}CJK-{weight.title()}.ttc", letters, box, face=2)
    (tables / "Unihan_IRGSources.txt.bz2").write_bytes(bz2.compress(SOURCES.encode()))
    (tables / "Unihan_Readings.txt.bz2").write_bytes(bz2.compress(READINGS.encode()))
    monkeypatch.setattr(chinese, "fetch", lambda name: {"chinese-characters": root}[name])
    return root


def test_characters_are_drawn_in_the_middle_with_the_captions_of_their_typefaces(few_characters, capsys):
    """By hand: the em of 28 pixels spans rows and columns 2 to 29; U+9FA0 lacks glyphs, 龘 a definition."""
    data = chinese.characters()
    images = dict(pair for part in (data.train, data.held_out) for pair in zip(part.captions, part.levels, strict=True))
    assert sorted(images) == sorted(
        f"{caption[0]}, {typeface}, {weight}; {caption[1]}"
        for caption in (
            ("one radical, 1 stroke", "one"),
            ("fire radical, 6 strokes", "ashes"),
            ("speech radical, 9 strokes", "language"),
        )
        for typeface, weight in BOXES
    )
    for caption, image in images.items():
        expected = np.full((1, 32, 32), 255, np.uint8)
        expected[0, 2 : 16 if "bold" in caption else 30, 2 : 16 if "serif" in caption else 30] = 0
        assert np.array_equal(image, expected), caption
    assert data.name == "characters"
    assert (data.shape, data.classes, data.train.labels, data.level_count) == ((1, 32, 32), None, None, 256)
    assert data.licence.startswith("OFL-1.1")
    assert "fonts-noto-cjk" in data.source
    assert "characters: rendered 4 of 4" in capsys.readouterr().err


def test_unseen_combinations_and_unseen_characters_are_held_out_and_all_else_is_not(few_characters):
    """By hand: of three characters the lowest hash is held out, whole; and "fire, 6 to 8, serif" in both weights."""
    data = chinese.characters()
    codes = {"one": "U+4E00", "ashes": "U+7070", "language": "U+8BED"}
    lowest = min(codes, key=lambda word: hashlib.sha256(codes[word].encode()).digest())
    assert {("serif", "bold", "6 to 8", "fire"), ("serif", "regular", "6 to 8", "fire")} < set(held_out_combinations())
    assert lowest == "language"
    for part, out in ((data.train, False), (data.held_out, True)):
        for caption in part.captions:
            assert (caption.endswith(lowest) or "fire radical, 6 strokes, serif" in caption) == out, caption
    assert (len(data.train), len(data.held_out)) == (6, 6)


def test_characters_are_rendered_once_and_recalled_the_same(few_characters):
    """Without the fonts, the second time."""
    before = chinese.characters()
    for file in few_characters.rglob("*.ttc"):
        file.unlink()
    after = chinese.characters()
    for one, other in ((before.train, after.train), (before.held_out, after.held_out)):
        assert torch.equal(one.levels, other.levels)
        assert one.captions == other.captions


@pytest.fixture(scope="module")
def all_characters():
    return CAPTIONED["characters"]()


@have("chinese-characters")
def test_the_characters_are_as_documented(all_characters):
    """Counts that the docstring states; 河 from a dictionary; no ink at the edge, so nothing is cut off."""
    data = all_characters
    captions = data.train.captions + data.held_out.captions
    images = torch.cat([data.train.levels, data.held_out.levels])
    assert len(captions) == len(images) == 4 * 14_483
    assert "water radical, 8 strokes, serif, bold; river" in captions
    edge = torch.cat([images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]], -1)
    assert (edge == 255).all()
    assert (images.flatten(1).amin(1) < 128).all()
    assert all(c.isascii() and c.isprintable() and c == c.lower() for c in captions)
    assert (
        max(len(c.split()) for c in captions) == 14
    )  # "short tailed bird radical, 14 strokes, ..." and six of the gloss
    said = attributes_of(captions)
    assert (said >= 0).all()
    radicals = [c.split(" radical")[0] for c in captions]
    common = sorted(set(radicals), key=lambda name: -radicals.count(name))[:20]
    assert common == list(ATTRIBUTES["radical"][:-1])
    pairs = {pair: 0 for pair in product(ATTRIBUTES["radical"][:-1], ATTRIBUTES["strokes"])}
    for _, _, strokes, radical in said.tolist():
        if radical < 20:
            pairs[ATTRIBUTES["radical"][radical], ATTRIBUTES["strokes"][strokes]] += 1
    assert {pair for pair, count in pairs.items() if count < 4 * 4} == chinese._TOO_FEW


@have("chinese-characters")
def test_the_characters_to_train_on_show_each_value_but_no_held_out_combination_or_image(all_characters):
    """Every value alone is in training; so is no image that is held out, pixel for pixel."""
    data = all_characters
    assert not unseen(data.train.captions).any()
    combination = unseen(data.held_out.captions)
    assert 0.02 < int((~combination).sum()) / (4 * 14_483) < 0.04
    for column, values in zip(attributes_of(data.train.captions).T, ATTRIBUTES.values(), strict=True):
        assert column.bincount(minlength=len(values)).min() > 500
    trained = {image.numpy().tobytes() for image in data.train.levels}
    assert not any(image.numpy().tobytes() in trained for image in data.held_out.levels)


# Emoji


def test_a_caption_of_an_emoji_is_its_name_and_up_to_six_keywords():
    """By hand: not the name again, no punctuation, no repetition."""
    words = ["grinning_face", "face", "smile", ":D", "face", "Joy", "keycap_\ufe0f", "3", "d", "e", "f"]
    assert pictographs._caption("GRINNING FACE", words) == "grinning face: face, smile, joy, keycap, 3, d"
    assert pictographs._caption("Åland Islands Flag", []) == "åland islands flag"
    assert pictographs._letters("0023-FE0F-20E3") == "#\ufe0f\u20e3"


@pytest.fixture
def few_emoji(tmp_path, monkeypatch):
    """The folder of the data set: 40 squares, each of its own grey; a component; and two that look the same."""
    monkeypatch.setenv("KUOSAN_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "emoji" / "emoji-datasource-google" / "img" / "google" / "64"
    images.mkdir(parents=True)
    listed, keywords = [], {}
    for number in range(44):
        code = f"{0x1F600 + number:X}"
        alpha = 0 if number >= 42 else 255 - number
        Image.new("RGBA", (64, 64), (0, 0, 0, alpha)).save(images / f"{code}.png")
        category = "Component" if number == 41 else ["Things", "Animals"][number % 2]
        listed.append(
            {"name": f"NUMBER {number}", "unified": code, "image": f"{code}.png", "short_name": f"n{number}"}
            | {"category": category, "has_img_google": number != 40, "skin_variations": {"1F3FB": {}, "1F3FC": {}}}
        )
        keywords[chr(0x1F600 + number)] = ["number", f"{number}"]
    (images.parents[2] / "emoji.json").write_text(json.dumps(listed))
    (tmp_path / "emoji" / "emojilib" / "dist").mkdir(parents=True)
    (tmp_path / "emoji" / "emojilib" / "dist" / "emoji-en-US.json").write_text(json.dumps(keywords))
    return tmp_path / "emoji"


def test_emoji_come_with_captions_and_categories(few_emoji):
    """By hand: on white, alpha 255 - n leaves the grey n; 40 has no image of Google, 41 is a component."""
    data = pictographs._read(few_emoji)
    found = {}
    for part in (data.train, data.held_out):
        for caption, image, label in zip(part.captions, part.levels, part.labels.tolist(), strict=True):
            assert image.unique().numel() == 1
            found[caption] = int(image[0, 0, 0]), data.classes[label]
    assert data.classes == ("Animals", "Things")
    assert data.shape == (3, 32, 32)
    expected = {f"number {n}: number, {n}": (n, ["Things", "Animals"][n % 2]) for n in range(40)}
    assert {caption: value for caption, value in found.items() if value[0] < 255} == expected
    assert data.notes[0] == "88 variations of skin colour and the category Component were left out"


def test_an_emoji_that_looks_like_a_held_out_one_is_not_trained_on(few_emoji, monkeypatch):
    """The two clear ones, of which one is held out."""
    monkeypatch.setattr(pictographs, "is_held_out", lambda names, share: np.array([name == "n43" for name in names]))
    data = pictographs._read(few_emoji)
    assert data.held_out.captions == ("number 43: number, 43",)
    assert (len(data.train), int((data.train.levels == 255).sum())) == (40, 0)
    assert data.notes[1].startswith("1 to train on that are also held out")


@have("emoji")
def test_the_emoji_are_as_documented():
    """Counts that the docstring states."""
    data = CAPTIONED["emoji"]()
    assert (len(data.train) + 1 + len(data.held_out), len(data.classes), data.shape) == (1905 + 1, 9, (3, 32, 32))
    assert "grinning face: face, smile, happy, joy, grin, smiley" in data.train.captions + data.held_out.captions

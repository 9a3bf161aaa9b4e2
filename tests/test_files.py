"""Folders of any data are read alike: which files count, which are held out, and what is no text."""

import os
from pathlib import Path

import pytest

import kuosan.image.data as image_data
import kuosan.speech.data as speech_data
import kuosan.text.data as text_data
from kuosan.files import decoded, is_held_out, visible_files


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def seen(folder, **how):
    return sorted(file.relative_to(folder).as_posix() for file in visible_files(folder, **how))


# -- which files there are --------------------------------------------------------------------------------------------


def test_files_at_any_depth_are_seen_and_hidden_ones_are_not(tmp_path):
    """The folder itself may be hidden."""
    root = tmp_path / ".root"
    put(root, "a", "b/c.txt", "b/d/e.PNG", ".f", ".git/g", "b/.h/i", "b/.j")
    (root / "empty").mkdir()
    assert seen(root) == ["a", "b/c.txt", "b/d/e.PNG"]


def test_links_to_other_folders_are_followed_or_not(tmp_path):
    """A link to a file counts in any case."""
    put(tmp_path, "elsewhere/a", "root/b")
    (tmp_path / "root/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/file").symlink_to(tmp_path / "elsewhere/a")
    assert seen(tmp_path / "root") == ["b", "file", "folder/a"]
    assert seen(tmp_path / "root", links=False) == ["b", "file"]


def test_links_that_go_round_are_not_followed(tmp_path):
    """To the folder that holds the link, and to one further up."""
    put(tmp_path, "root/a", "root/sub/b")
    (tmp_path / "root/again").symlink_to(tmp_path / "root")
    (tmp_path / "root/sub/up").symlink_to(tmp_path)
    assert seen(tmp_path / "root") == ["a", "sub/b"]


READERS = {
    "pictures": lambda folder: image_data.folder(folder, 4),
    "texts": lambda folder: text_data.load(folder, length=4),
    "speech": speech_data.load,
    "any": lambda folder: list(visible_files(folder)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("secret", ["root", "root/sub/secret"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, read, secret):
    """As the system says it to who may not; whoever runs this may."""
    put(tmp_path, "root/sub/a.png", "root/sub/a.txt", "root/sub/a.wav", "root/sub/secret/b.png")
    scan = os.scandir

    def refuse(path):
        if Path(path) == tmp_path / secret:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=rf"the folder .*{secret} cannot be listed: Permission denied"):
        read(tmp_path / "root")


# -- which are held out -----------------------------------------------------------------------------------------------


def test_the_rule_is_the_same_on_every_machine():
    """`printf 8 | sha256sum`: of 0 to 19, "8" is 2c62..., "9" is 1958..., all others are above a fifth, 3333..."""
    names = [str(n) for n in range(20)]
    assert is_held_out(names, 0.2).nonzero()[0].tolist() == [8, 9]


def test_names_added_later_move_no_other():
    """A thousand, then ten thousand; a share of 0.2 to five standard errors of a binomial law."""
    names = [f"class/{n}.png" for n in range(10_000)]
    held = is_held_out(names, 0.2)
    assert (is_held_out(names[:1000], 0.2) == held[:1000]).all()
    assert abs(held.mean() - 0.2) < 5 * (0.2 * 0.8 / 10_000) ** 0.5


def test_both_parts_have_one_however_small_the_share():
    """By `sha256sum`: "b" is 3e23..., "c" 2e7d..., "a" ca97..."""
    assert is_held_out(["a", "b", "c"], 1e-9).tolist() == [False, False, True]
    assert is_held_out(["a", "b", "c"], 1 - 1e-9).tolist() == [False, True, True]


def test_a_name_that_is_not_utf_8_has_a_place_too():
    """As `os.listdir` gives it: the byte ff, of which `printf '\\xff' | sha256sum` prints a810..., 0.656 of 1."""
    name = os.fsdecode(b"\xff")
    assert is_held_out(["c", name, "a"], 0.65).tolist() == [True, False, False]
    assert is_held_out(["c", name, "a"], 0.66).tolist() == [True, True, False]


# -- what is in them --------------------------------------------------------------------------------------------------


def test_line_ends_stay_and_the_mark_before_utf_8_does_not(tmp_path):
    """Only the first mark is one; a second is text."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfcaf\xc3\xa9\r\none\rtwo\n")
    assert decoded(file) == "\ufeffcaf\u00e9\r\none\rtwo\n"
    file.write_bytes(b"")
    assert decoded(file) == ""


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"ok\nna\xefve\n", r"byte 5 \(0xef\), in line 2"),
        ("ok".encode("utf-16"), r"byte 0 \(0xff\), in line 1"),
        (b"x" * 1234 + b"\n" * 1000 + b"\xc3", r"byte 2,234 \(0xc3\), in line 1,001"),
    ],
)
def test_what_is_not_utf_8_says_where(tmp_path, content, where):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt: {where}, is not UTF-8"):
        decoded(file)

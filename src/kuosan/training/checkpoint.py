"""Checkpoints that survive kill -9, full disks and flipped bits: written aside, hashed, renamed into place."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

FORMAT = 1
SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or there are checkpoints but none that may be used."""


class _Damaged(Exception):
    """What is wrong with one checkpoint; the store then tries the one before it."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: tensors by group ("weights", "ema", "optimizer", ...) and name, and JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class CheckpointStore:
    """The checkpoints of one run: ``step-00003000/`` with one safetensors file per group and a hashed manifest.

    A checkpoint is written into ``.writing-*``, fsynced and renamed, and nothing is removed before its successor is in
    place; so whenever the process dies, the newest complete checkpoint is found again. Only safetensors is ever parsed,
    and only after its sha256 was checked; a pickle is never opened. One process writes; any number may read.

    Args:
        folder: where the checkpoints lie; made by the first save.
        fingerprint: of the recipe; checkpoints with another fingerprint are refused, never overwritten.
        keep: how many checkpoints remain after a save.
        warn: called with one line when a damaged checkpoint is passed over; prints to stderr unless given.

    Raises:
        ValueError: keep is less than 1.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int = 2, warn: Callable[[str], None] = _print) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.keep = keep
        self.warn = warn
        self._damaged: set[int] = set()  # seen by this object; not counted among those to keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether each is intact is only known by loading it."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        matches = [re.fullmatch(r"(?:step|\.replaced)-(\d{8,})", name) for name in names]
        return sorted({int(match[1]) for match in matches if match})

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, put it in place at once, then remove those beyond ``keep``; the same step is replaced.

        Tensors may be on any device, share memory or be non-contiguous; what comes back is dense and on the CPU.
        Keys in ``state`` are strings and its values what JSON gives back unchanged (lists, not tuples).

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: the disk is full or not writable (earlier checkpoints are untouched), the folder belongs
                to another recipe, or it holds an intact checkpoint of a later step.
            TypeError: the state is not JSON.
            ValueError: the step is negative or a group's name cannot name a file.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        for group in tensors:
            if not re.fullmatch(r"\w[\w-]*", group, re.ASCII):
                raise ValueError(f"a group's name is made of letters, digits, _ and -, got {group!r}")
        json.dumps(dict(state))  # a TypeError must come before the first byte is written
        self._refuse_to_mix(step)
        target, writing, replaced = (self.folder / f"{kind}-{step:08d}" for kind in ("step", ".writing", ".replaced"))
        try:
            _make_folder(self.folder)
            self._tidy()
            writing.mkdir()
            files = {}
            for group, named in tensors.items():
                data = safetensors.torch.save(_dense(named))
                files[group + SUFFIX] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                _write(writing / (group + SUFFIX), data)
            manifest = {"format": FORMAT, "step": step, "fingerprint": self.fingerprint, "files": files}
            data = (json.dumps({**manifest, "state": dict(state)}, indent=2) + "\n").encode()
            _write(writing / "manifest.json", data)
            _write(writing / "manifest.sha256", _seal(data))
            _sync_folder(writing)
            if target.exists():
                target.rename(replaced)  # still found by load until the next line is done
            writing.rename(target)
            _sync_folder(self.folder)
        except BaseException as error:
            with contextlib.suppress(OSError):  # the first error is the one to tell; the next save tidies again
                self._tidy()
            if isinstance(error, OSError):
                raise CheckpointError(self._not_saved(step, tensors, error)) from error
            raise
        self._damaged.discard(step)
        self._tidy()
        self._remove_beyond_keep(step)
        return target

    def load(self, groups: Collection[str] | None = None) -> Checkpoint | None:
        """Read the newest undamaged checkpoint onto the CPU, or only some of its groups; None when there is none.

        Raises:
            CheckpointError: there are checkpoints but all are damaged; the newest is from another recipe, in a newer
                format or without a group asked for; or the folder holds pickles instead of checkpoints.
        """
        passed: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self._read(step, groups)
            except _Damaged as damage:
                self._damaged.add(step)
                passed.append((step, str(damage)))
                continue
            for bad, why in passed:
                self.warn(f"{self.folder}: checkpoint {bad} is damaged ({why}); using checkpoint {step}")
            return checkpoint
        if passed:
            each = ", ".join(f"{step} ({why})" for step, why in passed)
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged: {each}; restore one or use a new folder"
            )
        if pickles := _pickles(self.folder):
            raise CheckpointError(f"{self.folder}: expected step-*/ folders, got {pickles}; move it away to start anew")
        return None

    def _path(self, step: int) -> Path:
        path, replaced = self.folder / f"step-{step:08d}", self.folder / f".replaced-{step:08d}"
        return replaced if replaced.exists() and not path.exists() else path

    def _manifest(self, step: int) -> dict[str, Any]:
        path = self._path(step)
        data = _bytes(path, "manifest.json")
        if _bytes(path, "manifest.sha256") != _seal(data):
            raise _Damaged("manifest.json does not match manifest.sha256")
        try:
            manifest = json.loads(data)
            if manifest["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: expected format {FORMAT}, got {manifest['format']}; use the Kuosan that wrote it"
                )
            if manifest["step"] != step:
                raise _Damaged(f"manifest.json is of step {manifest['step']}")
            if manifest["fingerprint"] != self.fingerprint:
                raise CheckpointError(
                    f"{path}: is from another recipe (fingerprint {manifest['fingerprint'][:8]}, expected "
                    f"{self.fingerprint[:8]}); use the recipe that it was trained with, or a new folder"
                )
            for name in manifest["files"]:
                if not re.fullmatch(r"\w[\w-]*\.safetensors", name, re.ASCII):
                    raise _Damaged(f"manifest.json lists {name}, and only safetensors files are ever opened")
        except (ValueError, KeyError, TypeError) as error:
            raise _Damaged(f"manifest.json was not written by Kuosan: {error!r}") from error
        return manifest

    def _read(self, step: int, groups: Collection[str] | None) -> Checkpoint:
        manifest, path = self._manifest(step), self._path(step)
        there = [name.removesuffix(SUFFIX) for name in manifest["files"]]
        if missing := sorted(set(groups or ()) - set(there)):
            raise CheckpointError(f"{path}: has no {', '.join(missing)}; it holds {', '.join(there) or 'no tensors'}")
        tensors = {}
        for group in there:
            if groups is None or group in groups:
                tensors[group] = _tensors(path, group + SUFFIX, manifest["files"][group + SUFFIX])
        return Checkpoint(step, tensors, manifest["state"])

    def _refuse_to_mix(self, step: int) -> None:
        for other in reversed(self.steps()):
            try:
                self._manifest(other)  # refuses another recipe
                if other > step:
                    self._read(other, None)
            except _Damaged:
                self._damaged.add(other)
            else:
                if other > step:
                    raise CheckpointError(
                        f"{self.folder}: cannot save step {step} because checkpoint {other} is there and intact; "
                        "load it and go on from it, or use a new folder"
                    )

    def _tidy(self) -> None:
        """Finish or undo what a killed save left behind."""
        for path in (*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")):
            shutil.rmtree(path, ignore_errors=True)
        for path in sorted(self.folder.glob(".replaced-*")):
            target = self.folder / path.name.replace(".replaced-", "step-")
            if target.exists():
                self._remove(path)
            else:
                path.rename(target)

    def _remove_beyond_keep(self, step: int) -> None:
        older = [other for other in self.steps() if other <= step]
        kept = [other for other in older if other not in self._damaged][-self.keep :]
        for other in older:
            if other not in kept:
                self._remove(self._path(other))

    def _remove(self, path: Path) -> None:
        aside = self.folder / f".removing-{path.name.lstrip('.')}"  # a half removed folder must not look like damage
        with contextlib.suppress(OSError):  # what cannot be removed now is tried again at the next save
            path.rename(aside)
            shutil.rmtree(aside)

    def _not_saved(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], error: OSError) -> str:
        message = f"{self.folder}: checkpoint {step} is not saved ({error.strerror or error})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
            existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(existing).free
            message += f": {_size(needed)} are needed, {_size(free)} are free; make room or lower keep ({self.keep})"
        return message + "; earlier checkpoints are untouched"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count} bytes"


def _seal(data: bytes) -> bytes:
    """The line that ``sha256sum --check`` reads."""
    return f"{hashlib.sha256(data).hexdigest()}  manifest.json\n".encode()


def _dense(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU where needed; safetensors refuses two names for one storage."""
    dense, seen = {}, set()
    for name, tensor in named.items():
        value = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = value.untyped_storage().data_ptr()
        dense[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return dense


def _make_folder(folder: Path) -> None:
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _pickles(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    return f"{', '.join(names)}, a pickle, which is never opened because it can run code" if names else ""


def _is_pickle(data: bytes) -> bool:
    zipped, pickled = (
        data[:4] == b"PK\x03\x04",
        data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"),
    )
    return (zipped or pickled) and data[8:9] != b"{"  # a safetensors header of 640 bytes also begins with 80 02


def _bytes(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except FileNotFoundError:
        there = _pickles(path)
        raise _Damaged(f"{name} is missing" + (f", there is {there}" if there else "")) from None
    except OSError as error:
        raise _Damaged(f"{name} cannot be read: {error.strerror}") from error


def _tensors(path: Path, name: str, entry: dict[str, Any]) -> dict[str, Tensor]:
    data = _bytes(path, name)
    if _is_pickle(data):
        raise _Damaged(f"{name} is a pickle, which is never opened because it can run code")
    if len(data) != entry["bytes"]:
        raise _Damaged(f"{name} has {len(data)} bytes, expected {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _Damaged(f"sha256 of {name} differs")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise _Damaged(f"{name} is not safetensors: {error}") from error

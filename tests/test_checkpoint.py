"""Checkpoints under everything that happens to files: kills, bit flips, truncation, full disks, pickles."""

import errno
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kuosan.training.checkpoint import CheckpointError, CheckpointStore

RECIPE = "0123456789abcdef"


def contents(step):
    """Tensors that say which step they belong to."""
    return {"weights": {"w": torch.full((64,), float(step))}, "ema": {"w": torch.full((3,), step + 0.5)}}


def state(step):
    return {"step": step, "sampler": {"seed": 7, "position": step * 64}}


def save(store, *steps):
    for step in steps:
        path = store.save(step, contents(step), state(step))
    return path


def is_of_its_step(checkpoint):
    expected = contents(checkpoint.step)
    return checkpoint.state == state(checkpoint.step) and all(
        torch.equal(checkpoint.tensors[group]["w"], expected[group]["w"]) for group in expected
    )


def bits(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).tolist()


def seal(path, change):
    """Rewrite a manifest so that its own sha256 is right again."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    data = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def store(tmp_path, warnings):
    return CheckpointStore(tmp_path / "run", RECIPE, warn=warnings.append)


def test_an_empty_folder_has_no_checkpoint(store):
    """Nothing was saved, and loading makes no folder either."""
    assert store.load() is None
    assert store.steps() == []
    assert not store.folder.exists()


def test_what_is_saved_comes_back_bit_for_bit(store):
    """The bytes of the saved tensors, with the values where rounding or sharing would show."""
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    wave = torch.tensor([1 + 2j, -3j])
    tensors = {
        "weights": {
            "half": torch.tensor([1.1, float("inf"), -0.0, 1e-40], dtype=torch.bfloat16),
            "nan": torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32),
            "scalar": torch.tensor(2.0**-30, dtype=torch.float64),
            "count": torch.tensor(2**62 + 1),
            "flag": torch.tensor([True, False]),
            "none": torch.zeros(0, 3),
            "turned": whole.T,
            "parameter": torch.nn.Parameter(whole),
            "conjugate": wave.conj(),
            "negative": wave.conj().imag,
        },
        "ema": {
            "shared": whole,
            "again": whole,
            "row": whole[2],
            "column": whole[:, 1],
            "wide": whole[:1].expand(5, 4),
        },
        "optimizer": {},
    }
    store.save(12, tensors, {"step": 12, "seconds": 0.1, "name": "葉", "none": None, "list": [1, 2.5]})
    found = store.load()
    assert found.step == 12
    assert found.state == {"step": 12, "seconds": 0.1, "name": "葉", "none": None, "list": [1, 2.5]}
    assert {group: set(named) for group, named in found.tensors.items()} == {g: set(n) for g, n in tensors.items()}
    for group, named in tensors.items():
        for name, tensor in named.items():
            got = found.tensors[group][name]
            assert (got.dtype, got.shape, got.device.type) == (tensor.dtype, tensor.shape, "cpu"), name
            assert bits(got) == bits(tensor), name
    found.tensors["ema"]["shared"].zero_()
    assert torch.equal(found.tensors["ema"]["again"], whole)


def test_the_manifest_can_be_checked_without_kuosan(store):
    """coreutils: sha256sum --check reads manifest.sha256, and the manifest lists what sha256sum says of each file."""
    path = save(store, 3000)
    assert path == store.folder / "step-00003000"
    subprocess.run(["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=path, check=True, capture_output=True)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["fingerprint"], manifest["state"]) == (3000, RECIPE, state(3000))
    for name, entry in manifest["files"].items():
        said = subprocess.run(["sha256sum", name], cwd=path, check=True, capture_output=True, text=True).stdout
        assert (said.split()[0], (path / name).stat().st_size) == (entry["sha256"], entry["bytes"])


def test_only_the_groups_asked_for_are_read(store, warnings):
    """Damage in another group does not matter to a reader of the ema; a group that was never saved is an error."""
    path = save(store, 1)
    (path / "weights.safetensors").write_bytes(b"")
    assert set(store.load(["ema"]).tensors) == {"ema"}
    assert warnings == []
    with pytest.raises(CheckpointError, match="has no optimizer; it holds weights, ema"):
        store.load({"ema", "optimizer"})


def test_the_newest_two_are_kept(store):
    """keep=2, the default."""
    save(store, 1, 2, 3, 4)
    assert store.steps() == [3, 4]
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000003", "step-00000004"]


def test_saving_a_step_again_replaces_it(store):
    """The second contents are read back, and nothing else remains."""
    save(store, 1, 2)
    store.save(2, {"weights": {"w": torch.ones(2)}}, {"second": True})
    assert store.load().state == {"second": True}
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001", "step-00000002"]


FILES = ["weights.safetensors", "ema.safetensors", "manifest.json", "manifest.sha256"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_or_a_cut_at_any_byte_falls_back_to_the_checkpoint_before(store, warnings, name):
    """Every byte of every file is flipped in one bit, and every shorter length is tried; nothing is sampled."""
    file = save(store, 2000, 3000) / name
    good = file.read_bytes()
    flips = (good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in range(len(good)))
    cuts = (good[:i] for i in range(len(good)))
    for bad in (*flips, *cuts, good + b" ", None):
        warnings.clear()
        file.unlink() if bad is None else file.write_bytes(bad)
        found = store.load()
        assert found.step == 2000
        assert is_of_its_step(found)
        (message,) = warnings
        assert message.startswith(f"{store.folder}: checkpoint 3000 is damaged (")
        assert message.endswith("); using checkpoint 2000")
        assert name in message
    file.write_bytes(good)
    assert store.load().step == 3000


def test_the_message_of_a_fall_back_goes_to_stderr_unless_told_otherwise(tmp_path, capsys):
    """The sentence of the house: what was found, what is used instead."""
    store = CheckpointStore(tmp_path, RECIPE)
    path = save(store, 2000, 3000)
    (path / "ema.safetensors").write_bytes((path / "ema.safetensors").read_bytes()[:-1] + b"!")
    store.load()
    expected = f"{tmp_path}: checkpoint 3000 is damaged (sha256 of ema.safetensors differs); using checkpoint 2000\n"
    assert capsys.readouterr().err == expected


def test_when_every_checkpoint_is_damaged_none_is_loaded(store, warnings):
    """None would start the training anew and hide the loss."""
    save(store, 1, 2)
    for path in store.folder.glob("*/weights.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged: 2 \(weights.* missing\), 1 \(weights"):
        store.load()
    assert warnings == []


def test_a_damaged_checkpoint_is_not_one_of_the_two_that_are_kept(store):
    """After the fall back to 2, the next save keeps 2 and 4; 3 protects nobody."""
    path = save(store, 2, 3)
    (path / "manifest.json").unlink()
    assert store.load().step == 2
    save(store, 4)
    assert store.steps() == [2, 4]


def test_after_a_fall_back_the_damaged_step_is_reached_and_saved_again(store, warnings):
    """Training goes on from 20, so 30 is saved a second time; until then its remains do not stop 25."""
    path = save(store, 20, 30)
    (path / "manifest.json").unlink()
    fresh = CheckpointStore(store.folder, RECIPE, warn=warnings.append)
    save(fresh, 25)
    assert fresh.load().step == 25
    save(fresh, 30)
    warnings.clear()
    assert fresh.load().step == 30
    assert warnings == []
    assert fresh.steps() == [25, 30]


def test_an_earlier_step_is_not_saved_below_an_intact_later_one(store):
    """The later one would win at the next load, and two trainings would be mixed."""
    save(store, 1, 2)
    with pytest.raises(CheckpointError, match="cannot save step 1 because checkpoint 2 is there and intact"):
        save(store, 1)
    assert is_of_its_step(store.load())


def test_a_checkpoint_of_another_recipe_is_neither_loaded_nor_overwritten(store):
    """Both fingerprints are told, because which key differs is not in them."""
    save(store, 1)
    other = CheckpointStore(store.folder, "fedcba9876543210")
    for act in (other.load, functools.partial(save, other, 1), functools.partial(save, other, 2)):
        with pytest.raises(CheckpointError, match=r"another recipe \(fingerprint 01234567, expected fedcba98\)"):
            act()
    assert is_of_its_step(store.load())
    assert store.steps() == [1]


def test_a_checkpoint_of_a_newer_format_is_not_called_damaged(store):
    """A Kuosan to come may write format 2; this one must not go back and train over it."""
    path = save(store, 1, 2)
    seal(path, lambda manifest: manifest.update(format=2))
    with pytest.raises(CheckpointError, match="expected format 1, got 2; use the Kuosan that wrote it"):
        store.load()


def test_a_renamed_checkpoint_is_not_taken_for_the_step_of_its_name(store, warnings):
    """The manifest has the step as well."""
    save(store, 1, 2).rename(store.folder / "step-00000009")
    assert store.load().step == 1
    assert "checkpoint 9 is damaged (manifest.json is of step 2)" in warnings[0]


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def bombs(tmp_path):
    """The same bomb as pickle.dump, torch.save and the older torch.save write it; each of them does go off."""
    target = tmp_path / "exploded"
    plain, zipped, legacy = tmp_path / "plain", tmp_path / "zipped", tmp_path / "legacy"
    plain.write_bytes(pickle.dumps(Bomb(target)))
    torch.save(Bomb(target), zipped)
    torch.save(Bomb(target), legacy, _use_new_zipfile_serialization=False)
    for file in (plain, zipped, legacy):
        with file.open("rb") as opened:
            pickle.load(opened) if file == plain else torch.load(file, weights_only=False)
        target.rmdir()
    return target, [file.read_bytes() for file in (plain, zipped, legacy)]


def test_a_pickle_under_the_name_of_safetensors_is_never_opened(store, warnings, bombs):
    """Even when its sha256 is in the manifest and right."""
    target, all_data = bombs
    for data in all_data:
        path = save(store, 1, 2)
        (path / "ema.safetensors").write_bytes(data)
        for sealed in (False, True):
            if sealed:
                entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                seal(path, lambda manifest, entry=entry: manifest["files"].update({"ema.safetensors": entry}))
            warnings.clear()
            assert store.load().step == 1
            assert "ema.safetensors is a pickle, which is never opened because it can run code" in warnings[0]
        shutil.rmtree(store.folder)
    assert not target.exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.bin", "weights.ckpt"])
def test_a_pickle_in_the_place_of_a_checkpoint_is_named_and_never_opened(store, warnings, bombs, name):
    """Beside the manifest, listed in the manifest, and alone in the folder."""
    target, all_data = bombs
    path = save(store, 1, 2)
    (path / name).write_bytes(all_data[1])
    assert store.load().step == 2  # intact; the stranger is left alone
    (path / "weights.safetensors").unlink()
    assert store.load().step == 1
    assert f"(weights.safetensors is missing, there is {name}, a pickle, which is never opened" in warnings.pop()
    seal(path, lambda manifest: manifest["files"].update({name: manifest["files"].pop("weights.safetensors")}))
    assert store.load().step == 1
    assert f"lists {name}, and only safetensors files are ever opened" in warnings.pop()
    shutil.rmtree(store.folder)
    store.folder.mkdir()
    (store.folder / name).write_bytes(all_data[0])
    with pytest.raises(CheckpointError, match=f"got {name}, a pickle, which is never opened"):
        store.load()
    assert not target.exists()


def test_a_safetensors_file_that_begins_like_a_pickle_is_still_read(store):
    """A header of 640 bytes makes the file begin with 80 02, as pickles of protocol 2 do."""
    for length in range(400, 700, 8):
        path = store.save(1, {"weights": {"w" * length: torch.ones(2)}}, {})
        if (path / "weights.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no header had 640 bytes")
    assert store.load().step == 1


def fails_after(function, calls, code):
    """The function, whose every call after so many raises."""
    left = iter(range(calls))

    def failing(*args, **kwargs):
        if next(left, None) is None:
            raise OSError(code, os.strerror(code))
        return function(*args, **kwargs)

    return failing


@pytest.mark.parametrize("again", [2, 3], ids=["the same step", "the next step"])
@pytest.mark.parametrize("calls", range(7))
def test_a_full_disk_leaves_the_earlier_checkpoints_and_nothing_else(store, monkeypatch, calls, again):
    """fsync is where a full disk is told at the latest: 2 groups, manifest, its sha256, 2 folders, so 6 calls."""
    save(store, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails_after(os.fsync, calls, errno.ENOSPC))
        if calls >= 6:
            save(store, again)
            return
        with pytest.raises(
            CheckpointError, match=rf"checkpoint {again} is not saved \(No space left .*\): 268 bytes are"
        ):
            save(store, again)
    assert {path.name for path in store.folder.iterdir()} <= {f"step-0000000{step}" for step in (1, 2, 3)}
    assert store.steps()[:2] == [1, 2]
    assert is_of_its_step(store.load())
    save(store, 3)
    assert store.steps() == [2, 3]


def test_a_disk_that_is_really_full_says_how_much_is_needed_and_how_much_is_free(tmp_path):
    """A tmpfs of 1 MiB, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        store = CheckpointStore(disk / "run", RECIPE)
        save(store, 1)
        with pytest.raises(
            CheckpointError, match=r"No space left.*: 2\.0 MiB are needed, \d+ bytes are free; make room"
        ):
            store.save(2, {"weights": {"w": torch.ones(2**19)}}, {})
        assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
        assert is_of_its_step(store.load())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_save_that_cannot_be_done_writes_nothing(store):
    """State that is no JSON, a group that is a path, a negative step, a keep of none."""
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(1, contents(1), {"generator": torch.Generator()})
    with pytest.raises(ValueError, match=r"a group's name .* got '\.\./ema'"):
        store.save(1, {"../ema": {}}, {})
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        store.save(-1, {}, {})
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        CheckpointStore(store.folder, RECIPE, keep=0)
    assert not store.folder.exists()


def test_an_interrupt_in_the_middle_of_a_save_leaves_nothing_behind(store, monkeypatch):
    """Ctrl-C comes as KeyboardInterrupt, here from fsync."""
    save(store, 1)

    def interrupt(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(store, 2)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]


@pytest.fixture(scope="module")
def processes():
    """Processes forked from a server that has imported torch once, so that each starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "kuosan.training.checkpoint"])
    return context


def save_and_die(folder, step, calls):
    """Die by SIGKILL before the so-many-th file operation of a save."""
    store, left = CheckpointStore(folder, RECIPE), iter(range(calls))

    def count(event, args):
        changes = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if changes and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save(store, step)
    os._exit(0)


@pytest.mark.parametrize(("step", "keep_before"), [(3, 2), (2, 2), (2, 1)], ids=["a new step", "again", "the only one"])
def test_a_kill_before_any_file_operation_of_a_save_leaves_an_intact_checkpoint(
    tmp_path, processes, warnings, step, keep_before
):
    """Python's audit events come before each open, mkdir, rename and remove: the kill is tried at every one of them."""
    save(CheckpointStore(tmp_path / "before", RECIPE, keep=keep_before), 1, 2)
    for calls in range(200):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(calls))
        child = processes.Process(target=save_and_die, args=(folder, step, calls))
        child.start()
        child.join()
        store = CheckpointStore(folder, RECIPE, warn=warnings.append)
        found = store.load()
        assert found.step in (2, step), calls
        assert is_of_its_step(found), calls
        assert warnings == [], calls
        assert all({file.name for file in path.iterdir()} == set(FILES) for path in folder.glob("step-*")), calls
        save(store, 4)
        assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{s}" for s in store.steps()], calls
        assert len(store.steps()) == 2
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert calls > 20


def save_for_ever(folder, first, saved):
    store = CheckpointStore(folder, RECIPE)
    store.load()
    for step in range(first, first + 10**6):
        save(store, step)
        if step == first:
            saved.send(step)


def test_kill_9_at_random_moments_never_costs_more_than_the_save_in_progress(tmp_path, processes, warnings):
    """The contents say which step they are of; the process is killed ten times and goes on each time."""
    moments, first = random.Random(0), 1
    store = CheckpointStore(tmp_path, RECIPE, warn=warnings.append)
    for _ in range(10):
        heard, saved = processes.Pipe(duplex=False)
        child = processes.Process(target=save_for_ever, args=(tmp_path, first, saved))
        child.start()
        assert heard.poll(20)
        time.sleep(moments.uniform(0, 0.2))
        child.kill()
        child.join()
        found = store.load()
        assert found.step >= first
        assert is_of_its_step(found)
        first = found.step + 1
    assert warnings == []
    save(store, first)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (first - 1, first)]


def test_leftovers_of_killed_saves_are_removed_by_the_next_save(store, warnings):
    """The names that a killed save leaves, made by hand; a replaced checkpoint without its successor is put back."""
    path = save(store, 1, 2)
    for name in (".writing-00000003", ".removing-step-00000000"):
        (store.folder / name).mkdir()
        (store.folder / name / "ema.safetensors").write_bytes(b"half")
    path.rename(store.folder / ".replaced-00000002")
    assert store.steps() == [1, 2]
    assert is_of_its_step(store.load())
    assert store.load().step == 2
    save(store, 3)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert warnings == []


def test_everything_is_on_the_disk_before_the_checkpoint_takes_its_name(store, monkeypatch):
    """The order that POSIX asks for: fsync of the files, of their folder, the rename, fsync of the parent."""
    done = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noted_rename(path, target):
        done.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    store.folder.mkdir()
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(store, 1)
    assert done == [*FILES, ".writing-00000001", ".writing-00000001 -> step-00000001", "run"]

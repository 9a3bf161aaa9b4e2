"""Training: the same run whether it was killed, interrupted, accumulated or shared by two processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kuosan as ks
from kuosan import recipe as recipes
from kuosan.build import make_objective
from kuosan.medium import read_data
from kuosan.recipe import RecipeError
from kuosan.runs import RunError
from kuosan.train import train
from kuosan.training.batches import indices
from kuosan.training.ema import EMA
from kuosan.training.loop import TrainingError, learning_rate

TINY = """
[data]
name = "digits"
conditional = true
[process]
kind = "cosine"
[network]
kind = "mlp"
width = 32
depth = 1
dropout = 0.1
[denoiser]
predicts = "v"
[objective]
kind = "simple"
times = { kind = "loss_aware", bins = 5, history = 2 }
[training]
steps = 40
batch_size = 16
warmup = 5
checkpoint_every = 10
sample_every = 0
[sampling]
steps = 4
[evaluation]
bound_steps = 20
samples = 20
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "kuosan.cli", *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def end_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    checkpoint = ks.load(folder).store.load()
    assert checkpoint is not None
    return {f"{group}/{name}": t for group, part in checkpoint.tensors.items() for name, t in part.items()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def test_a_run_interrupted_at_any_step_and_continued_is_the_same_run(tiny, tmp_path):
    """Truth: the uninterrupted run. Weights, averages, moments, sampler history and the log agree bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = recipes.read(tiny)
    train(recipe, whole)
    for until in (3, 17, 29):
        stopped = stop_at(until)
        with pytest.raises(RuntimeError, match="stopped here"):
            train_with(recipe, parts, stopped)
    train(recipe, parts)
    assert_same(end_of(whole), end_of(parts))
    assert losses(whole) == losses(parts)


def stop_at(step: int):
    def on_step(trainer) -> None:
        if trainer.step == step:
            raise RuntimeError("stopped here")

    return on_step


def train_with(recipe, folder, on_step) -> None:
    """Train, but call ``on_step`` before every step: a crash from within, that saves nothing."""
    from kuosan.training.loop import Trainer

    own = Trainer._one_step

    def one_step(self, model):
        on_step(self)
        return own(self, model)

    Trainer._one_step = one_step
    try:
        train(recipe, folder)
    finally:
        Trainer._one_step = own


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_in_the_same_weights_bit_for_bit(tiny, tmp_path):
    """Truth: the run that nobody killed. A checkpoint is written at every step, so most kills hit a write."""
    overrides = ["training.steps=600", "training.checkpoint_every=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("train", tiny, *overrides, "--out", whole), env=environment(), check=True)
    dice = random.Random(0)
    kills = 0
    while kills < 10:
        before = len((killed / "metrics.jsonl").read_text()) if (killed / "metrics.jsonl").exists() else 0
        process = subprocess.Popen(command("train", tiny, *overrides, "--out", killed), env=environment())
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            log = killed / "metrics.jsonl"
            if log.exists() and len(log.read_text()) > before:
                break
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.4))
        assert process.poll() is None, "the run ended before it could be killed: give it more steps"
        process.kill()
        process.wait()
        kills += 1
    done = subprocess.run(
        command("train", tiny, *overrides, "--out", killed),
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "going on from step" in done.stderr
    assert_same(end_of(whole), end_of(killed))
    assert losses(whole) == losses(killed)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tiny, tmp_path):
    """Truth: one process at the same whole batch. Without dropout, which each process draws for itself."""
    overrides = ["training.steps=50", "network.dropout=0.0"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipes.read(tiny, overrides), one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kuosan.cli"]
    subprocess.run([*launcher, "train", tiny, *overrides, "--out", two], env=environment(), check=True)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_accumulating_in_parts_gives_the_losses_of_the_whole_batch(tiny, tmp_path):
    """Truth: the batch computed at once; only the order of summation differs."""
    overrides = ["network.dropout=0.0"]
    train(recipes.read(tiny, overrides), tmp_path / "one")
    train(recipes.read(tiny, [*overrides, "training.accumulate=4"]), tmp_path / "four")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_control_c_saves_the_state_and_says_so_in_the_exit_code(tiny, tmp_path):
    """Exit code 130 is the shell's convention for an interrupted command; the same command then goes on."""
    folder = tmp_path / "run"
    words = command("train", tiny, "training.steps=100000", "--out", folder)
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.02)
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in words
    saved = ks.load(folder).store.load()
    assert saved is not None
    assert saved.step == len(losses(folder))


def test_every_epoch_sees_every_example_once():
    """Truth: counting."""
    n, batch = 10, 4
    seen = torch.cat([indices(seed=3, step=k, batch_size=batch, n=n) for k in range(5)])  # two epochs
    for epoch in seen.split(n):
        assert sorted(epoch.tolist()) == list(range(n))
    assert seen[:n].tolist() != seen[n:].tolist()


def test_the_average_forgets_its_start_and_then_moves_slowly():
    """Truth: the recurrence written out by hand."""
    network = torch.nn.Linear(1, 1, bias=False)
    average = EMA(network, decay=0.9)
    by_hand = float(network.weight.detach())
    for k in range(200):
        with torch.no_grad():
            network.weight.fill_(k)
        average.update(network, k)
        b = min(0.9, (1 + k) / (10 + k))
        by_hand = b * by_hand + (1 - b) * k
    assert float(average.average["weight"]) == pytest.approx(by_hand, rel=1e-5)
    with average.swapped_in(network):
        assert float(network.weight.detach()) == pytest.approx(by_hand, rel=1e-5)
        assert not network.training
    assert float(network.weight.detach()) == 199
    assert network.training


def test_buffers_are_not_averaged():
    """A schedule or a running statistic is not a parameter: averaging it would make it another one."""
    network = torch.nn.BatchNorm1d(2)
    assert set(EMA(network, 0.9).average) == {"weight", "bias"}


def test_the_learning_rate_rises_and_falls_as_the_recipe_says(tiny):
    settings = recipes.read(tiny, ["training.learning_rate=0.1", "training.steps=105"]).training
    rates = [learning_rate(settings, k) for k in range(105)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[5] == 0.1
    assert rates[55] == pytest.approx(0.05)  # half way down the cosine
    assert rates[-1] < 1e-4


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_examples(tiny, tmp_path, monkeypatch):
    recipe = recipes.read(tiny)
    objective = make_objective(recipe)

    def poisoned(denoiser, x_0, condition=None, **draws):
        loss = objective(denoiser, x_0, condition, **draws)
        return torch.where(torch.arange(len(loss)) == 2, torch.nan, loss) if train_calls() == 5 else loss

    calls = iter(range(10**6))
    train_calls = lambda: next(calls)  # noqa: E731
    poisoned.times, poisoned.noise_shape = objective.times, objective.noise_shape
    monkeypatch.setattr("kuosan.train.make_objective", lambda recipe: poisoned)
    example = int(indices(recipe.seed, 5, 16, 1500)[2])
    with pytest.raises(TrainingError, match=rf"not finite at step 5: example {example} at t = .*learning_rate"):
        train(recipe, tmp_path / "run")


def test_a_folder_with_another_recipes_run_is_refused(tiny, tmp_path):
    train(recipes.read(tiny, ["training.steps=2"]), tmp_path / "run")
    with pytest.raises(RunError, match="another recipe"):
        train(recipes.read(tiny, ["training.steps=2", "seed=1"]), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("not a run")
    with pytest.raises(RunError, match="not empty and not a run"):
        train(recipes.read(tiny), tmp_path / "other")


def test_a_mistake_in_a_recipe_does_not_spoil_its_folder(tiny, tmp_path):
    """Nothing is written before everything that training, sampling and measuring will need has been made once."""
    for mistake in ("objective.kind=best", "sampling.solver.kind=best", "process.kind=[1]"):
        with pytest.raises(RecipeError, match="kind: must be one of"):
            train(recipes.read(tiny, [mistake]), tmp_path / "run")
    train(recipes.read(tiny, ["training.steps=2"]), tmp_path / "run")


def test_a_run_does_not_go_on_with_other_data(tiny, tmp_path, monkeypatch):
    """One pixel of one training image is another; what the folder says of itself stays as it was."""
    recipe = recipes.read(tiny, ["training.steps=2"])
    train(recipe, tmp_path / "run", "first")
    before = (tmp_path / "run" / "run.json").read_text()
    data = read_data(recipe.data)
    data.train.levels[7, 0, 3, 3] += 1
    monkeypatch.setattr("kuosan.train.read_data", lambda section: data)
    with pytest.raises(RunError, match="trained on other data"):
        train(recipe, tmp_path / "run", "second")
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(tiny, tmp_path, monkeypatch):
    """The square root of 0 has a finite value and an infinite slope."""
    recipe = recipes.read(tiny, ["training.checkpoint_every=1"])
    objective = make_objective(recipe)

    def steep(denoiser, x_0, condition=None, **draws):
        first = next(denoiser.network.parameters())
        return objective(denoiser, x_0, condition, **draws) + (0 * first).square().sum().sqrt()

    steep.times, steep.noise_shape = objective.times, objective.noise_shape
    monkeypatch.setattr("kuosan.train.make_objective", lambda recipe: steep)
    with pytest.raises(TrainingError, match="gradient is not finite at step 0"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_batch_that_two_processes_cannot_share_evenly_is_refused():
    from kuosan.training.processes import Processes

    with pytest.raises(ValueError, match="a batch of 7 cannot be shared evenly by 2"):
        Processes(0, 2).part(7)


def test_tensorboard_gets_the_same_losses(tiny, tmp_path):
    """Truth: metrics.jsonl."""
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(recipes.read(tiny, ["training.steps=5", "training.tensorboard=true"]), tmp_path / "run")
    events = board.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(tmp_path / "run"), rel=1e-6)


def test_a_run_may_begin_with_the_weights_of_another_and_keep_some_of_them(tiny, tmp_path):
    """Truth: the other run's averaged weights; what is frozen keeps them, what is not leaves them."""
    train(recipes.read(tiny, ["training.steps=3"]), tmp_path / "first")
    begun = [f"training.start={tmp_path / 'first'}", 'training.freeze=["network.enter"]', "training.steps=3"]
    train(recipes.read(tiny, begun), tmp_path / "second")
    before, after = end_of(tmp_path / "first"), end_of(tmp_path / "second")
    assert torch.equal(after["ema/network.enter.weight"], before["ema/network.enter.weight"])
    assert not torch.equal(after["weights/network.leave.weight"], before["ema/network.leave.weight"])
    shutil.rmtree(tmp_path / "first")
    assert ks.load(tmp_path / "second").sample(1).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('training.freeze=["nonsense"]', "no parameter's name begins with 'nonsense'; they begin with network"),
        ('training.freeze=["network"]', "nothing is left to be trained"),
        ("training.start=nowhere", "nowhere is not a run"),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_training(tiny, tmp_path, override, words):
    with pytest.raises(ValueError, match=words):
        train(recipes.read(tiny, [override]), tmp_path / "run")
    assert not (tmp_path / "run").exists()

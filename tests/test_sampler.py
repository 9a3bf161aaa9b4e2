"""A run's way of sampling: settings over the recipe's, tuned tables and what they are refused for, processes."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import kuosan as ks
from kuosan import Denoiser, Process
from kuosan.cli import main
from kuosan.compare import compare
from kuosan.image.data import to_levels
from kuosan.image.pictures import to_image
from kuosan.recipe import RecipeError
from kuosan.sampler import Settings, TunedTableError
from kuosan.samples import save_samples
from kuosan.solvers import DDIM, Clip, DynamicThreshold, Karras, SamplingError
from test_run import make, refused, said

QUICK = {"pairs": 64, "iterations": 20, "batch_size": 16, "fine": 20}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tuned"), predicts="x0")


@pytest.fixture(scope="module")
def tuned(run):
    """The run, with a table of 4 evaluations tuned without guidance."""
    run.tune(4, **QUICK)
    return run


def table_path(run):
    return run.tuned.path(4, run.tuned.fingerprint(run.denoiser, Settings.of(run.recipe.sampling)))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_replaces_the_recipe_s(run):
    how = run.sampler(solver={"kind": "ddim", "eta": 0.5}, grid={"kind": "karras", "last": 0.01}, steps=7).how
    assert how["solver"].startswith("DDIM(eta=0.5")
    assert how["grid"].startswith("Karras(last=0.01")
    assert how["evaluations"] == 7
    objects = run.sampler(solver=DDIM(0.5), grid=Karras(last=0.01), steps=7)
    assert objects.table == run.sampler(solver={"kind": "ddim", "eta": 0.5}, grid=Karras(last=0.01), steps=7).table
    assert run.sampler(grid=ks.Grid((1.0, 0.5, 0.2))).table.times == (1.0, 0.5, 0.2)


def test_clipping_thresholding_and_neither(run):
    assert isinstance(run.sampler().transform, Clip)
    assert isinstance(run.sampler(threshold=0.99).transform, DynamicThreshold)
    assert run.sampler(clip=False).transform is None


def test_guidance_reaches_the_model(run):
    guided = run.sampler(guidance=2.0, interval=(0.1, 5.0), rescale=0.5).model
    assert (guided.weight, tuple(guided.interval), guided.rescale) == (2.0, (0.1, 5.0), 0.5)
    assert run.sampler().model is run.denoiser


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 3}, "stepz: there is no such key"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"rescale": 2.0}, "rescale"),
        ({"clip": True, "threshold": 0.9}, "threshold takes the place of clip"),
        ({"grid": {"kind": "karas"}}, "sampling.grid.kind: must be one of time"),
        ({"corrector": {"kind": "langevin", "snr": -1.0}}, "snr"),
        ({"known": torch.zeros(1), "mask": torch.ones(1) > 0, "corrector": {"kind": "langevin"}}, "would move what"),
        ({"known": torch.zeros(1)}, "needs both known, the picture, and mask"),
        ({"weak": None, "corrections": 2}, "needs both known"),
    ],
)
def test_impossible_settings_say_what_is_wrong(run, given, message):
    with pytest.raises(RecipeError, match=message):
        Settings.of(run.recipe.sampling, **given)


def test_a_weaker_run_guides(run, tmp_path):
    """x0 + w (x0 - x0_weak): the same samples where the weaker run is the run itself, others where it is not."""
    assert torch.equal(run.sample(4, weak=run, guidance=2.0, steps=4), run.sample(4, steps=4))
    folder = tmp_path / "weak"
    shutil.copytree(run.folder, folder)
    weak = ks.load(folder)
    with torch.no_grad():
        for parameter in weak.denoiser.parameters():
            parameter.mul_(0.5)
    sampler = run.sampler(weak=weak, guidance=2.0, steps=4)
    assert sampler.how["weak"] == str(folder)
    x, c = torch.randn(3, *run.shape, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    strong, poor = (d(x, 0.5, c).x0 for d in (run.denoiser, weak.denoiser))
    assert torch.allclose(sampler.model(x, 0.5, c).x0, strong + 2 * (strong - poor), atol=1e-5)
    assert not torch.allclose(strong, poor, atol=1e-3)


def test_what_is_known_is_held_and_the_rest_is_drawn(run, capsys, tmp_path):
    """By tensors, and by pictures on the command line: white in the mask is drawn anew."""
    known = torch.linspace(-1, 1, 17)[torch.arange(64) % 17].reshape(run.shape)
    mask = torch.zeros(run.shape, dtype=torch.bool)
    mask[..., :3] = True
    for solver, steps in ((DDIM(), 4), ({"kind": "ancestral"}, 4), ({"kind": "auto"}, 12)):
        drawn = run.sample(4, known=known, mask=mask, steps=steps, solver=solver)
        assert torch.equal(drawn[:, mask], to_levels(known, run.levels)[mask].expand(4, -1))
        free = run.sample(4, steps=steps, solver=solver)
        assert not torch.equal(drawn[:, ~mask], free[:, ~mask])
    picture, where = tmp_path / "known.png", tmp_path / "mask.png"
    to_image(to_levels(known, run.levels), run.levels).save(picture)
    to_image((~mask).to(torch.uint8), 2).save(where)
    words = ("--known", picture, "--mask", where, "--steps", 4, "--solver", "ddim", "-n", 2)
    found = said(capsys, "sample", run.folder, *words)
    assert (found["held"], found["known"], found["mask"]) == (3 / 8, str(picture), str(where))
    levels = np.array(Image.open(found["samples"][0]["file"]))
    assert np.array_equal(levels[:, :3], np.array(Image.open(picture))[:, :3])


def test_a_threshold_leaves_what_is_known(run):
    """Its scaling is of what is drawn: x0 twice too large, but for the known ones."""
    known, mask = torch.full(run.shape, 0.9), torch.zeros(run.shape, dtype=torch.bool)
    mask[..., :4, :] = True
    transform = run.sampler(known=known, mask=mask, threshold=0.9).transform
    x = torch.where(mask, known, 2.0).expand(3, *run.shape)
    assert torch.equal(transform(x), torch.where(mask, known, 1.0).expand(3, *run.shape))


def test_bfloat16_is_of_the_network_alone(run):
    """Its products have 8 bits; the state, the noise and the table's sums keep theirs: nearly the same samples."""
    seen = []
    hook = run.denoiser.network.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
    half = run.sample(8, steps=4, precision="bfloat16").int()
    hook.remove()
    assert seen == [(torch.float32, torch.bfloat16)] * 4
    full = run.sample(8, steps=4).int()
    assert float((half - full).abs().double().mean()) < 0.05 * (run.levels - 1)
    assert run.sampler(precision="bfloat16").how["precision"] == "bfloat16"
    with pytest.raises(RecipeError, match="precision"):
        run.sampler(precision="float16")


def test_a_corrector_changes_the_samples_and_keeps_seeds_apart(run):
    plain, corrected = run.sample(4), run.sample(4, corrector={"kind": "langevin"})
    assert not torch.equal(plain, corrected)
    alone = run.sample(seeds=[2], labels=torch.tensor([2]), corrector={"kind": "langevin"})[0]
    assert int((alone.int() - corrected[2].int()).abs().max()) <= 1  # rounding at a level's border


# -- tuned tables -----------------------------------------------------------------------------------------------------


def test_a_tuned_table_is_used_by_default_at_its_number_of_steps_alone(tuned):
    assert tuned.sampler(solver={"kind": "auto"}, steps=4).how["solver"].startswith("tuned (")
    assert tuned.sampler(solver={"kind": "auto"}, steps=5).how["solver"].startswith("Auto(")
    assert "tuned" not in tuned.sampler(solver={"kind": "ddim"}, steps=4).how["solver"]
    kept = json.loads(table_path(tuned).read_text())
    assert tuned.sampler(solver={"kind": "tuned"}, steps=4).table.to_json() == kept["table"]
    assert kept["errors"]["rmse"] <= kept["start_errors"]["rmse"]


def test_tuning_twice_gives_the_same_file(tuned, tmp_path):
    before = table_path(tuned).read_bytes()
    tuned.tune(4, **QUICK)
    assert table_path(tuned).read_bytes() == before


def test_a_tuned_table_is_refused_for_anything_else(tuned, capsys):
    """Another weight of guidance, other clipping, other weights, another schedule; auto says so and goes on."""
    path, section = table_path(tuned), tuned.recipe.sampling
    with pytest.raises(TunedTableError, match=r"there is no .*steps-4-guidance-1.json.*kuosan tune"):
        tuned.sampler(solver={"kind": "tuned"}, steps=4, guidance=1.0)
    with pytest.raises(TunedTableError, match=r"tuned for other clip \(True, asked for False\)"):
        tuned.sampler(solver={"kind": "tuned"}, steps=4, clip=False)
    original = path.read_text()
    held = {"known": torch.zeros(tuned.shape), "mask": torch.ones(tuned.shape, dtype=torch.bool)}
    with pytest.raises(TunedTableError, match="tuned without anything held"):
        tuned.sampler(solver={"kind": "tuned"}, steps=4, **held)
    assert tuned.sampler(solver={"kind": "auto"}, steps=4, **held).how["solver"].startswith("Auto(")
    with pytest.raises(ValueError, match="tuned without anything held"):
        tuned.tune(4, settings=held)
    weak = tuned.tuned.fingerprint(tuned.denoiser, Settings.of(section, weak=tuned.denoiser, guidance=1.0))
    assert tuned.tuned.path(4, weak).name.startswith("steps-4-guidance-1-weak-")
    for key in ("weights", "schedule"):
        content = json.loads(original)
        content["fingerprint"][key] = "0" * 16
        path.write_text(json.dumps(content))
        with pytest.raises(TunedTableError, match=f"tuned for other {key}: tune again"):
            tuned.sampler(solver={"kind": "tuned"}, steps=4)
        assert tuned.sampler(solver={"kind": "auto"}, steps=4).table.evaluations == 4
        assert f"tuned for other {key}" in capsys.readouterr().err
    path.write_text("{")
    with pytest.raises(TunedTableError, match="is damaged"):
        tuned.sampler(solver={"kind": "tuned"}, steps=4)
    path.write_text(original)
    settings = Settings.of(section)
    other = tuned.tuned.fingerprint(tuned.denoiser.around(nn.Linear(1, 1)), settings)
    mine = tuned.tuned.fingerprint(tuned.denoiser, settings)
    assert other["weights"] != mine["weights"]
    elsewhere = Denoiser(tuned.denoiser.network, Process(ks.schedules.Cosine(s=0.01)), "x0")
    assert tuned.tuned.fingerprint(elsewhere, settings)["schedule"] != mine["schedule"]


def test_the_commands_tune_table_and_compare(tuned, capsys, tmp_path):
    words = ("--pairs", 64, "--iterations", 20, "--batch-size", 16, "--fine", 20)
    found = said(capsys, "tune", tuned.folder, "--steps", 3, "--guidance", 1, *words)
    assert found["table"].endswith("steps-3-guidance-1.json")
    assert (
        "tuned"
        in said(capsys, "sample", tuned.folder, "-n", 2, "--steps", 3, "--guidance", 1, "--solver", "auto")["solver"]
    )
    picture = tmp_path / "table.png"
    shown = said(capsys, "table", tuned.folder, "--solver", "unipc", "--steps", 5, "--plot", picture)
    assert len(shown["table"]["rows"]) == 5
    assert Image.open(picture).size[0] > 500
    found = said(
        capsys, "compare", tuned.folder, "-n", 20, "--evaluations", "3-4", "--solvers", "auto", "tuned", "heun"
    )
    assert [(p["solver"], p["evaluations"]) for p in found["points"]] == [
        ("auto", 3),
        ("auto", 4),
        ("tuned", 4),
        ("heun", 3),
        ("heun", 3),
    ]
    assert (tuned.folder / "compare.png").is_file()
    assert main(["compare", str(tuned.folder), "-n", "20", "--evaluations", "3", "--solvers", "ancestral"]) == 0
    assert "ancestral" in capsys.readouterr().out


def test_comparing_measures_the_distance_to_the_fine_solution(run):
    """More evaluations are nearer; the fine solver itself, at its own number of steps, is at no distance."""
    found = compare(run, ["ddim", "adams_bashforth order=4"], [5, 40], samples=16)
    errors = {(p["solver"], p["evaluations"]): p["rmse"] for p in found["points"]}
    assert errors["ddim", 40] < errors["ddim", 5]
    assert errors["adams_bashforth order=4", 40] < errors["ddim", 40]
    (itself,) = compare(run, ["adams_bashforth order=4"], [200], samples=8)["points"]
    assert itself["rmse"] == 0


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solver", "heun", "--steps", "1"], "order 2: it needs at least as many steps, got 1"),
        (["--solver", "tuned", "--steps", "9"], "`kuosan tune .* --steps 9` makes it"),
        (["--grid", "1,0.5,0.5"], "times must strictly decrease"),
        (["--grid", "0.2,0.5"], "times must strictly decrease"),
        (["--grid", "1,0.5", "--steps", "3"], "2 times are given, but 3 steps asked for"),
        (["--grid", "1,x"], "a grid is a name with its settings, or times"),
        (["--interval", "3", "1", "--guidance", "1"], "interval"),
        (["--weak", "nowhere", "--guidance", "1"], "nowhere is not a run: there is no such folder"),
        (["--known", "no.png", "--mask", "no.png"], "no.png cannot be read as a picture"),
        (["--corrections", "1"], "inpainting needs both known, the picture, and mask"),
        (["--known", "no.png"], "no.png cannot be read as a picture"),
        (["--precision", "float8"], "precision"),
    ],
)
def test_the_command_refuses(run, capsys, words, message):
    assert re.search(message, refused(capsys, "sample", run.folder, *words))


def test_guidance_of_an_unconditional_model_is_refused(tmp_path, capsys):
    plain = make(tmp_path, "false", "ddpm", "eps")
    capsys.readouterr()
    assert "trained with classes" in refused(capsys, "sample", plain.folder, "--guidance", "1")
    assert "steps must lie in 1 to 1000, got 1001" in refused(capsys, "sample", plain.folder, "--steps", "1001")


class Breaks(nn.Module):
    """A network that returns NaN for one example at one time."""

    def forward(self, x, t, condition=None):
        broken = (t < 0.55) & (t > 0.45) & (torch.arange(len(x)) == 2)
        return torch.where(broken[:, None], torch.nan, 0.1 * x)


def test_a_network_that_breaks_is_named_with_its_seed_and_step():
    denoiser = Denoiser(Breaks(), Process(ks.schedules.Cosine()), "x0")
    with pytest.raises(SamplingError, match=r"seed 12: the model's output is not finite at step 3 of 4, t = 0.5"):
        ks.sample(denoiser, (2,), seeds=range(10, 15), solver=DDIM(), steps=4)


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_what_one_would(run, tmp_path):
    """The same seeds, shared out; every file holds the same levels, which rounding leaves alone here."""
    one = save_samples(run, range(5), out=tmp_path / "one", steps=3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kuosan.cli"]
    words = ["sample", str(run.folder), "--seeds", "0-4", "--steps", "3", "--out", str(tmp_path / "two")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 samples") == 1
    for file in one["samples"]:
        name = file["file"].rpartition("/")[2]
        mine, theirs = (np.array(Image.open(tmp_path / folder / name)) for folder in ("one", "two"))
        assert int(np.abs(mine.astype(int) - theirs).max()) <= 16  # one level of 17, where a value lay on a border
    assert (tmp_path / "two" / "sheet.png").is_file()


# -- what is kept between calls does no harm --------------------------------------------------------------------------


class Reuses(nn.Module):
    """A network that answers in the same memory every time, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.memory = torch.empty(3, 2)

    def forward(self, x, t, condition=None):
        return self.memory.copy_(0.3 * x + t[:, None])


class Fresh(Reuses):
    def forward(self, x, t, condition=None):
        return 0.3 * x + t[:, None]


def test_a_network_that_answers_in_the_same_memory_every_time():
    """Fine where nothing looks back; refused, instead of wrong, where something does."""
    process = Process(ks.schedules.Cosine())
    models = [Denoiser(net(), process, "x0") for net in (Reuses, Fresh)]
    draw = [ks.sample(model, (2,), seeds=range(3), solver=DDIM(), steps=6) for model in models]
    assert torch.equal(*draw)
    with pytest.raises(ValueError, match="let it return a new tensor each time"):
        ks.sample(models[0], (2,), seeds=range(3), steps=6)


def test_a_process_and_a_table_that_were_used_can_be_pickled():
    denoiser = Denoiser(Fresh(), Process(ks.schedules.Cosine()), "eps")
    table = DDIM().table(denoiser.process, steps=4)
    x = torch.ones(3, 2)
    truth = ks.solvers.run(table, denoiser, x)
    again, same = pickle.loads(pickle.dumps((table, denoiser)))
    assert torch.equal(ks.solvers.run(again, same, x), truth)


def test_sampling_in_inference_mode_leaves_training_possible():
    class Learns(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, t, condition=None):
            return self.weight * x * t[:, None]

    denoiser = Denoiser(Learns(), Process(ks.schedules.Cosine()), "x0")
    with torch.inference_mode():
        denoiser(torch.ones(3, 2), 0.5)
    denoiser(torch.ones(3, 2), 0.5).x0.sum().backward()
    assert denoiser.network.weight.grad is not None


def test_tuning_leaves_the_gradients_of_the_model_alone(run):
    for p in run.denoiser.parameters():
        p.requires_grad_(True)
    ks.solvers.tune(run.denoiser, run.shape, 2, labels=run.labels_for, **QUICK)
    assert all(p.grad is None for p in run.denoiser.parameters())
    for p in run.denoiser.parameters():
        p.requires_grad_(False)


@pytest.mark.parametrize("predicts", ["eps", "score", "x0"])
def test_tuning_begins_where_there_is_no_signal(predicts):
    """The rectified flow at t = 1, where noise alone says nothing of x0: NaN, if it were asked as a tensor."""
    denoiser = Denoiser(Fresh(), Process(ks.schedules.RectifiedFlow()), predicts)
    found = ks.solvers.tune(denoiser, (2,), 3, **QUICK)
    assert np.isfinite(found.errors.rmse)
    assert found.improved

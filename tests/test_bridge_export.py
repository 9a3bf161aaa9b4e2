"""Runs as folders that diffusers opens: the same weights, the same samples, and a card that invents nothing."""

import json
import os
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import kuosan as ks
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.image.data import to_levels
from kuosan.runs import RunError
from kuosan.solvers import SOLVERS, Clip, DynamicThreshold, Noise, Row, Table
from kuosan.train import train
from test_bridge_networks import unet

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers")

import kuosan.bridge  # noqa: E402
from kuosan.bridge import export as exporting  # noqa: E402
from kuosan.bridge.components import TableScheduler  # noqa: E402
from kuosan.bridge.export import export  # noqa: E402
from kuosan.bridge.networks import DiffusersNetwork  # noqa: E402

SMALL = """
[data]
{data}
{sections}
[objective]
{objective}
[training]
steps = 30
batch_size = 32
warmup = 5
sample_every = 0
{start}
[sampling]
{sampling}
[evaluation]
bound_steps = 10
examples = 20
samples = 20
"""
MLP = '[network]\nkind = "mlp"\nwidth = 32\ndepth = 1\n'
CODER = '[autoencoder]\nkind = "convolutional"\nchannels = 2\nfactor = 2\nwidth = 8\ndecoder = "levels"\n'
DIGITS, CLASSES = 'name = "digits"', 'name = "digits"\nconditional = true'


def trained(folder, sections, data=DIGITS, objective='kind = "simple"', sampling="", start=""):
    folder.mkdir(parents=True, exist_ok=True)
    sampling = f"steps = 5\n{sampling}" if "[process]" in sections else ""
    text = SMALL.format(data=data, sections=sections, objective=objective, sampling=sampling, start=start)
    (folder / "small.toml").write_text(text, "utf-8")
    train(recipes.read(folder / "small.toml"), folder / "run")
    return ks.load(folder / "run")


def pixels(folder, process, predicts, **others):
    edm = 'preconditioning = "edm"\n' if others.pop("edm", False) else ""
    denoiser = f'[denoiser]\npredicts = "{predicts}"\n{edm}'
    return trained(folder, f'[process]\nkind = "{process}"\n{MLP}{denoiser}', **others)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Unconditional, in discrete time, predicting eps, with a table of 3 steps tuned to it."""
    run = pixels(tmp_path_factory.mktemp("plain"), "ddpm", "eps")
    run.tune(3, pairs=8, iterations=3, batch_size=8, fine=8)
    return run


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Told classes, predicting levels."""
    return pixels(tmp_path_factory.mktemp("told"), "cosine", "levels", data=CLASSES)


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("coder"), CODER, objective='kind = "elbo"')


def latent(folder, coder, data):
    network = '[network]\nkind = "transformer"\npatch = 2\nwidth = 16\ndepth = 1\nheads = 2\nchannels = 8\n'
    sections = f'{CODER}[process]\nkind = "flow"\n{network}[denoiser]\npredicts = "flow"\n'
    start, objective = f'start = "{coder.folder}"', 'kind = "latent"\nweighting = {kind = "edm", sigma_data = 1.0}'
    return trained(folder, sections, data, objective, "clip = false", start)


def opened(path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, n=4, **options):
    found = pipe(generator=kuosan.bridge.generators(range(n)), output_type="np", **options).images
    return torch.from_numpy(np.asarray(found)).movedim(-1, 1)


def drawn(run, n=4, **settings):
    """What the run's own sampler draws, before it is rounded to levels, as diffusers shows images: in [0, 1]."""
    sampler = run.sampler(**settings)
    condition = run.labels_for(n)
    x = ks.sample(
        sampler.model,
        run.state_shape,
        seeds=range(n),
        table=sampler.table,
        condition=condition,
        transform=sampler.transform,
    )
    if run.recipe.family == "latent":
        x = run.decoded(run.autoencoder, x)
    return (x / 2 + 0.5).clamp(0, 1)


def in_a_clean_process(code, folder=None):
    words = [sys.executable, "-c", code]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, check=False)


# -- the scheduler -----------------------------------------------------------------------------------------------------

PROCESSES = {
    "cosine": ks.schedules.Cosine(),
    "ddpm": ks.schedules.linear_beta_table(1000),
    "flow": ks.schedules.RectifiedFlow(),
}


def steps_of(scheduler, denoiser, process, x, generator=None):
    """A pipeline's loop, with the time worked out from the timestep by hand."""
    flow = isinstance(process.schedule, ks.schedules.RectifiedFlow)
    scheduler.set_timesteps(len(scheduler.config.tables[next(iter(scheduler.config.tables))]["rows"]))
    for timestep in scheduler.timesteps:
        t = (float(timestep) + (0 if flow else 1)) / 1000
        x = scheduler.step(denoiser(x, t).value, timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("predicts", ["x0", "v"])
@pytest.mark.parametrize(
    ("solver", "transform"),
    [
        ("auto", None),
        ("unipc", Clip()),
        ("dpm_solver++", DynamicThreshold(0.9, 0.5)),
        ("ancestral", None),
        ("ancestral", Clip(-0.4, 0.3)),
    ],
)
def test_a_scheduler_gives_the_numbers_of_the_executor(name, predicts, solver, transform, tmp_path):
    """Truth: ks.solvers.run with the same noise; also after saving, loading, and from its configuration."""
    process = ks.Process(PROCESSES[name])
    table = SOLVERS[solver]().table(process, steps=7)
    denoiser = ks.Denoiser(_Wave(), process, predicts)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    dice = torch.Generator().manual_seed(2)
    truth = ks.solvers.run(table, denoiser, x, lambda: torch.randn(x.shape, generator=dice), transform=transform)
    made = TableScheduler.of([table], process, predicts, transform)
    made.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text("utf-8"), parse_constant=pytest.fail)
    for scheduler in (made, TableScheduler.from_pretrained(tmp_path), TableScheduler.from_config(made.config)):
        found = steps_of(scheduler, denoiser, process, x, torch.Generator().manual_seed(2))
        assert torch.allclose(found, truth, rtol=1e-6, atol=1e-6)


class _Wave(torch.nn.Module):
    """A network of no weights whose answers depend on x and on t."""

    def forward(self, x, t, condition=None):
        return torch.tanh(x.roll(1, -1) - 0.3 * x) * (0.5 + t[:, None, None, None])


def test_noise_that_comes_back_later_is_kept_and_that_which_never_comes_is_not_drawn():
    """Truth: the executor. Row 2 uses the noise of row 1, which row 1 does not use itself; nothing uses row 0's."""
    process = ks.Process(ks.schedules.Cosine())
    third = Row(0.5, x=(0.3, 0.1), m=(0.4, 0.1), z=(0.2, 0.7))
    rows = (Row(1.0, x=0.5, m=0.2), Row(0.8, x=0.5, m=0.2), third, Row(0.3, m=1.0))
    table, denoiser = Table(rows, "x0"), ks.Denoiser(_Wave(), process, "x0")
    x, dice = torch.ones(2, 1, 4, 4), torch.Generator().manual_seed(5)
    truth = ks.solvers.run(table, denoiser, x, lambda: torch.randn(x.shape, generator=dice))
    scheduler = TableScheduler.of([table], process, "x0")
    assert torch.allclose(steps_of(scheduler, denoiser, process, x, torch.Generator().manual_seed(5)), truth, atol=1e-6)


def test_a_table_of_ddim_is_diffusers_ddim():
    """Truth: diffusers' own DDIMScheduler on the same betas and timesteps, its x0 clipped by its own option."""
    process = ks.Process(ks.schedules.linear_beta_table(1000))
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    theirs.set_timesteps(10)
    grid = ks.Grid(tuple((int(t) + 1) / 1000 for t in theirs.timesteps))
    ours = TableScheduler.of([SOLVERS["ddim"]().table(process, grid)], process, "eps")
    ours.set_timesteps(10)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    torch.manual_seed(0)
    x = y = torch.randn(2, 1, 8, 8)
    for t in theirs.timesteps:
        said = torch.sin(3 * x)
        (x, first), (y, second) = (one.step(said, t, x, return_dict=False) for one in (theirs, ours))
        assert torch.allclose(first, second, atol=2e-3)  # theirs is in float32, and divides by a small alpha
        assert torch.allclose(x, y, atol=2e-5)
    noise, t = torch.randn_like(x), theirs.timesteps[[3, 7]]
    assert torch.allclose(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t), atol=1e-6)


def test_a_table_drops_into_a_pipeline_of_diffusers_in_one_line(tmp_path):
    """Truth: the executor with the same UNet through the adapter of this package, and the pipeline's own noise."""
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    pipe = opened(tmp_path)
    process = ks.Process(ks.schedules.linear_beta_table(1000))
    table = SOLVERS["dpm_solver++"]().table(process, steps=6)
    pipe.scheduler = TableScheduler.of([table], process, "eps", Clip())
    found = images(pipe, batch_size=4, num_inference_steps=6)
    denoiser = ks.Denoiser(DiffusersNetwork(pipe.unet), process, "eps")
    truth = ks.sample(denoiser, (1, 8, 8), seeds=range(4), table=table, transform=Clip())
    assert torch.allclose(found, (truth / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_a_tuned_table_is_taken_where_there_is_one(plain):
    """Truth: the file that `kuosan tune` wrote, and the times of the recipe's solver."""
    written = json.loads((plain.folder / "tables" / "steps-3.json").read_text("utf-8"))["table"]
    scheduler = kuosan.bridge.scheduler_of(plain.folder, steps=3)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * row["t"] - 1 for row in written["rows"]])
    assert sorted(kuosan.bridge.scheduler_of(plain).config.tables) == ["3", "5"]
    assert len(scheduler) == 1000
    assert scheduler.init_noise_sigma == 1


def test_a_scheduler_refuses_what_is_not_its_next_step(plain):
    scheduler = kuosan.bridge.scheduler_of(plain, steps=[5, 3])
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="call set_timesteps before the first step"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="has tables of 3, 5 evaluations: num_inference_steps is one of them, got 50"):
        scheduler.set_timesteps(50)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"step 1 of 3 is at timestep .* got .*: a table is taken in order"):
        scheduler.step(x, scheduler.timesteps[1], x)
    with pytest.raises(ValueError, match=r"output has shape \(1, 2, 8, 8\) and the sample \(1, 1, 8, 8\)"):
        scheduler.step(torch.zeros(1, 2, 8, 8), scheduler.timesteps[0], x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all 3 steps are done"):
        scheduler.step(x, scheduler.timesteps[2], x)
    scheduler.set_timesteps(3)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"timestep 700\.3 is in none of these tables"):
        scheduler.add_noise(x, x, torch.tensor([700.3]))
    with pytest.raises(ValueError, match="made of tables"):
        TableScheduler.from_config(diffusers.DDPMScheduler().config)
    with pytest.raises(ValueError, match="predict x0, eps, v, flow, not 'score'"):
        TableScheduler.of([Table((Row(1.0, m=1.0),))], plain.denoiser.process, "score")


# -- the folder --------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_checkpoint_bit_for_bit(plain, tmp_path):
    """Truth: the averaged weights as the checkpoint file has them."""
    export(plain, tmp_path / "out")
    kept = safetensors.torch.load_file(plain.folder / "checkpoints" / "step-00000030" / "ema.safetensors")
    assert len(kept) > 8
    network = opened(tmp_path / "out").unet
    for found in (
        safetensors.torch.load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"),
        network.state_dict(),
    ):
        assert {name.removeprefix("denoiser.") for name in found} == set(kept)
        assert all(torch.equal(found[f"denoiser.{name}"], tensor) for name, tensor in kept.items())


def test_an_unconditional_run_gives_the_same_samples(plain, tmp_path):
    """Truth: the run's own samples of the same seeds, before and after they are rounded to levels."""
    pipe = opened(export(plain, tmp_path / "out", [3, 8]))
    assert type(pipe) is diffusers.DDPMPipeline
    for steps in (3, 8):
        found = images(pipe, batch_size=4, num_inference_steps=steps)
        assert torch.allclose(found, drawn(plain, steps=steps), atol=1e-6)
        assert torch.equal(to_levels(2 * found - 1, 17), plain.sample(4, steps=steps))
    assert images(pipe, 1, batch_size=1, num_inference_steps=3).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_a_run_of_classes_gives_the_same_samples_guided_or_not(told, weight, tmp_path):
    """Truth: the run's own. diffusers counts the weight from 1."""
    pipe = opened(export(told, tmp_path / "out", 5, weight))
    assert type(pipe) is diffusers.DiTPipeline
    labels = pipe.get_label_ids(["0", "1", "2", "3"])
    found = images(pipe, class_labels=labels, guidance_scale=1 + weight, num_inference_steps=5)
    assert torch.allclose(found, drawn(told, steps=5, guidance=weight), atol=1e-6)
    assert torch.equal(to_levels(2 * found - 1, 17), told.sample(4, steps=5, guidance=weight))


@pytest.mark.parametrize(
    ("process", "predicts", "others"),
    [
        ("cosine", "x0", {"edm": True}),
        ("flow", "eps", {}),  # which says nothing of x0 at its start
        ("sub_vp", "velocity", {"sampling": "threshold = 0.9\nclip = false"}),
        ("linear", "energy", {}),
        ("cosine", "score", {"sampling": 'solver = {kind = "ancestral"}'}),
        ("learned", "v", {"objective": 'kind = "continuous"'}),
    ],
)
def test_whatever_a_network_predicts_the_samples_are_the_same(process, predicts, others, tmp_path):
    """Truth: the run's own samples."""
    run = pixels(tmp_path, process, predicts, **others)
    found = images(opened(export(run, tmp_path / "out")), batch_size=4, num_inference_steps=5)
    assert torch.allclose(found, drawn(run), atol=1e-6)


@pytest.mark.parametrize("data", [DIGITS, CLASSES])
def test_a_latent_run_gives_the_same_images(coder, data, tmp_path):
    """Truth: the run's own codes, decoded by its own autoencoder; and its weights."""
    run = latent(tmp_path, coder, data)
    pipe = opened(export(run, tmp_path / "out"))
    told = {"class_labels": [0, 1, 2, 3], "guidance_scale": 1} if run.conditional else {"batch_size": 4}
    assert type(pipe).__name__ == ("DiTPipeline" if run.conditional else "LDMPipeline")
    assert torch.allclose(images(pipe, num_inference_steps=5, **told), drawn(run), atol=1e-6)
    own = (pipe.vae if run.conditional else pipe.vqvae).autoencoder
    kept = dict(run.model.named_parameters())
    assert all(torch.equal(p, kept[name]) for name, p in own.named_parameters())
    x = run.examples("held_out", 2)[0]
    assert torch.equal(own.encode(x).mean, run.autoencoder.encode(x).mean)


def test_a_network_takes_times_and_classes_as_pipelines_give_them(told, tmp_path):
    """Truth: the run's own denoiser. 1000 is diffusers' word for no class; a time may be one, or one for each."""
    network = opened(export(told, tmp_path / "out")).transformer
    x, times = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    with torch.no_grad():
        wanted = told.denoiser(x, times, torch.tensor([4, -1, 9])).x0
        found = network(x, 1000 * times - 1, class_labels=torch.tensor([4, 1000, 9])).sample
        assert torch.allclose(found, wanted, atol=1e-6)
        assert torch.allclose(network(x, 499).sample, told.denoiser(x, 0.5, None).x0, atol=1e-6)
        with pytest.raises(ValueError, match="load them in float32"):
            network.half()(x.half(), 499)
        found = network.double()(x.double(), 499, return_dict=False)[0]
        assert found.dtype == torch.float64


@pytest.mark.slow
def test_the_example_of_the_card_runs_in_a_clean_process(told, tmp_path):
    """Truth: the samples of the run, in this process, as bytes. The folder has been moved."""
    (export(told, tmp_path / "out", 5, 1.0)).rename(tmp_path / "moved")
    card = (tmp_path / "moved" / "README.md").read_text("utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    done = in_a_clean_process(code, tmp_path / "moved")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "moved" / "sample.png") as picture:
        found = torch.from_numpy(np.asarray(picture).astype(int))
    wanted = (255 * drawn(told, steps=5, guidance=1.0)[0, 0]).round().int()
    assert (found - wanted).abs().max() <= 1


@pytest.mark.slow
def test_the_bridge_imports_diffusers_only_when_asked(plain, tmp_path):
    """And without it says what to install; nor does diffusers import this package, which is why a card says to."""
    code = "import kuosan.bridge, kuosan.cli, kuosan.bridge.export, sys; assert 'diffusers' not in sys.modules"
    assert in_a_clean_process(code).returncode == 0
    missing = "import sys; sys.modules['diffusers'] = None; from kuosan.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", missing, "export", str(plain.folder), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install kuosan[diffusers]" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("ddpm", None),
        ("ddpm, learned variance", None),
        ("ldm, vq", None),
        ("ldm, euler", None),
        ("dit", None),
        ("stable diffusion", None),
        ("ddpm", 7),
        ("ddpm, learned variance", 7),  # which the tables take no notice of
        ("dit", 7),
        ("stable diffusion", 7),
    ],
)
def test_what_was_imported_is_exported_as_it_was(name, steps, tmp_path):
    """Truth: the pipeline that diffusers made: its weights bit for bit, its images; or, with a solver of this package,
    the run's own. A folder of nothing but diffusers' parts names no other library."""
    from kuosan.bridge.importing import import_pipeline
    from test_bridge_import import pipeline  # skips without transformers

    made, told = pipeline(name, tmp_path)
    made.save_pretrained(tmp_path / "saved")
    made = opened(tmp_path / "saved")  # as it was made, it is still being trained: DiT drops classes
    run = import_pipeline(tmp_path / "saved", tmp_path / "run").run
    if steps is not None:  # another solver, of this package
        text = recipes.read(tmp_path / "run" / "recipe.toml", ['sampling.solver.kind="dpm_solver++"']).to_toml()
        (tmp_path / "run" / "recipe.toml").write_text(text, "utf-8")
        run = ks.load(tmp_path / "run")
    pipe = opened(export(run, tmp_path / "out", steps))
    assert type(pipe) is type(made)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text("utf-8"))
    libraries = {of[0] for of in index.values() if isinstance(of, list)}
    assert ("kuosan.bridge.components" in libraries) == (steps is not None)
    for file in (tmp_path / "saved").rglob("*.safetensors"):
        one = safetensors.torch.load_file(file)
        two = safetensors.torch.load_file(tmp_path / "out" / file.relative_to(tmp_path / "saved"))
        two = {name.removeprefix("denoiser.network.model."): tensor for name, tensor in two.items()}
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    texts = [file.read_text("utf-8") for file in (tmp_path / "out").rglob("*") if file.suffix in (".json", ".md")]
    assert not any(str(tmp_path) in text for text in texts)
    assert any("not known: the weights were imported" in text for text in texts)
    assert any("the licence of the pipeline that they came from" in text for text in texts)
    told = told or {"batch_size": 3}
    told |= {} if name != "dit" else {"guidance_scale": 4.0}
    if steps is None:
        torch.manual_seed(0)
        truth = images(made, 3, num_inference_steps=5, **told)
        torch.manual_seed(0)
        assert torch.allclose(images(pipe, 3, num_inference_steps=5, **told), truth, atol=1e-6)
        return
    labels = torch.tensor(told["class_labels"]) if name == "dit" else None
    prompt = {"prompt": told["prompt"]} if "prompt" in told else {}
    wanted = run.sample(3, steps=steps, labels=labels, **prompt).int()
    found = to_levels(2 * images(pipe, 3, num_inference_steps=steps, **told) - 1, 256).int()
    assert (found - wanted).abs().max() <= 1  # a level of 256, by rounding


@pytest.mark.slow
def test_a_folder_of_nothing_but_diffusers_parts_opens_without_this_package(tmp_path):
    """Truth: the card's example, in a process in which this package cannot be imported."""
    from kuosan.bridge.importing import import_pipeline

    made = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(num_train_timesteps=20))
    made.save_pretrained(tmp_path / "saved")
    path = export(import_pipeline(tmp_path / "saved", tmp_path / "run").run, tmp_path / "out")
    code = (path / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    assert "num_inference_steps=20" in code
    done = in_a_clean_process("import sys; sys.modules['kuosan'] = None\n" + code, path)
    assert done.returncode == 0, done.stderr
    assert (path / "sample.png").is_file()


def head_of(card):
    """The YAML at the head: keys with words or lists of them."""
    _, head, body = card.split("---\n", 2)
    found: dict = {}
    for line in head.splitlines():
        if line.startswith("- "):
            found[key].append(line[2:])  # noqa: F821
        else:
            key, value = line.split(":", 1)
            found[key] = value.strip() or []
    return found, body


def test_the_card_says_what_is_known_and_what_is_not(plain, tmp_path):
    """Truth: run.json, recipe.toml, and after `kuosan evaluate` evaluation.json."""
    first = (export(plain, tmp_path / "a") / "README.md").read_text("utf-8")
    head, body = head_of(first)
    assert head["license"] == "other"
    assert head["library_name"] == "diffusers"
    assert "kuosan" in head["tags"]
    assert "| bound | not measured" in body
    assert "| quality | not measured" in body
    info = json.loads((plain.folder / "run.json").read_text("utf-8"))
    recipe = tomllib.loads((plain.folder / "recipe.toml").read_text("utf-8"))
    for words in (
        f"| parameters | {info['parameters']:,} |",
        info["data"]["licence"],
        f"{info['data']['train']:,} to train on",
        f"| training | {recipe['training']['steps']} steps of {recipe['training']['batch_size']}",
        f"| machine | {info['machine']} |",
        f"torch {info['versions']['torch']}",
        "5 evaluations: auto; 3 evaluations: tuned to this run",
        "| training seed | 0 |",
        "clipped to [-1, 1]",
        "one of 5, 3:",
    ):
        assert words in body, words
    plain.evaluate()
    measured = json.loads((plain.folder / "evaluation.json").read_text("utf-8"))
    body = head_of((export(plain, tmp_path / "b") / "README.md").read_text("utf-8"))[1]
    bound = measured["likelihoods"]["bound"]
    assert f"| bound | {bound['total']:.4f} ± {bound['standard_error']:.4f}" in body
    assert f"Frechet distance {measured['quality']['frechet']:.3f}" in body
    (plain.folder / "evaluation.json").write_text(json.dumps(measured | {"step": 29}), "utf-8")
    body = head_of((export(plain, tmp_path / "c") / "README.md").read_text("utf-8"))[1]
    assert "| bound | not measured" in body  # of other weights
    (plain.folder / "evaluation.json").unlink()


def test_a_folder_of_ones_own_pictures_is_not_told_where_it_lay(tmp_path):
    dice = np.random.default_rng(0)
    (tmp_path / "secret" / "cats").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(dice.integers(0, 255, (8, 8), np.uint8)).save(tmp_path / "secret" / "cats" / f"{i}.png")
    own = f'folder = "{tmp_path / "secret" / "cats"}"\nsize = 8\nchannels = 1'
    path = export(pixels(tmp_path, "cosine", "v", data=own), tmp_path / "out")
    texts = [file.read_text("utf-8") for file in path.rglob("*") if file.suffix in (".json", ".md")]
    assert len(texts) == 4
    assert not any(word in text for text in texts for word in ("secret", str(tmp_path)))
    assert "cats (a folder of pictures); licence: not stated" in texts[[t.startswith("---") for t in texts].index(True)]
    assert images(opened(path), batch_size=4, num_inference_steps=5).shape == (4, 1, 8, 8)


def test_export_is_a_command(told, tmp_path, capsys):
    assert main(["export", str(told.folder), str(tmp_path / "a"), "--steps", "4,6", "--guidance", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evaluations"] == [4, 6]
    assert found["pipeline"] == "DiTPipeline"
    assert main(["export", str(told.folder), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.strip().endswith("README.md")
    assert "guidance_scale=2," in (tmp_path / "a" / "README.md").read_text("utf-8")


def test_what_cannot_be_exported_is_refused_in_words(plain, coder, tmp_path, capsys):
    def refused(run, *words):
        assert main(["export", str(run), str(tmp_path / "out"), *words]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "is not a run" in refused(tmp_path)
    assert "is the run of an autoencoder: diffusers is given diffusion models of images" in refused(coder.folder)
    assert "nothing to guide towards" in refused(plain.folder, "--guidance", "1")
    assert "steps must lie in 1 to 1000, got 1001" in refused(plain.folder, "--steps", "1001")
    assert main(["export", str(plain.folder), str(plain.folder)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    with pytest.raises(RunError, match="begins with noise of standard deviation 80, and DDPMPipeline with 1"):
        export(pixels(tmp_path / "ve", "ve", "eps"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"a corrector is no table.*drop sampling\.corrector"):
        export(pixels(tmp_path / "c", "cosine", "v", sampling='corrector = {kind = "langevin"}'), tmp_path / "out")


def test_guidance_that_changes_with_the_step_is_refused(tmp_path):
    run = pixels(tmp_path, "cosine", "v", data=CLASSES, sampling="guidance = 1.0\ninterval = [0.1, 2.0]")
    with pytest.raises(ValueError, match=r"the same weight at every step: drop sampling\.interval"):
        export(run, tmp_path / "out")
    assert export(run, tmp_path / "out", guidance=0.0).is_dir()


def test_the_folder_is_written_whole_or_not_at_all(plain, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(exporting, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(plain, tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out"]


def test_the_noise_of_a_seed_is_that_of_this_package():
    """Truth: the draws that sampling begins with."""
    from diffusers.utils.torch_utils import randn_tensor

    wanted = Noise([3, 9], (1, 4, 4)).draw()
    assert torch.equal(randn_tensor((2, 1, 4, 4), kuosan.bridge.generators([3, 9])), wanted)
    with pytest.raises(ValueError, match="repeated: 3"):
        kuosan.bridge.generators([3, 3])

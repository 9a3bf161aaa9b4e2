"""Text conditions: readers of captions, guidance away from a prompt, and runs that are sampled with prompts."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

import kuosan as ks
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.image.captioned import CaptionedMedium
from kuosan.networks import Transformer
from kuosan.networks.captions import Captions, Reader
from kuosan.recipe import RecipeError
from kuosan.runs import LatentRun, load
from kuosan.solvers import ClassifierFree, LinearBetaTime, Noise, UniformTime
from kuosan.train import train
from test_autoencoders import seeded, shaken

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230), "white": (250, 250, 250)}

RECIPE = """
[data]
folder = "{folder}"
size = 8

[data.captions]
length = 10
vocabulary = 40

[reader]
width = 32
depth = 1
heads = 2

[process]
kind = "cosine"

[network]
kind = "transformer"
patch = 2
width = 64
depth = 2
heads = 2
channels = 16

[denoiser]
predicts = "v"

[objective]
kind = "simple"

[training]
steps = 300
batch_size = 64
learning_rate = 3e-3
ema = 0.98
sample_every = 0

[sampling]
steps = 8

[evaluation]
bound_steps = 20
examples = 10
samples = 8
"""
AUTOENCODER = """
[autoencoder]
kind = "convolutional"
channels = 4
factor = 2
decoder = "shared"
width = 16
"""


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Black pictures with a square, and captions that say its colour and side."""
    folder = tmp_path_factory.mktemp("squares")
    lines = []
    for colour, values in COLOURS.items():
        for side, x in (("left", 0), ("right", 4)):
            for k in range(12):
                picture = Image.new("RGB", (8, 8))
                picture.paste(tuple(max(0, v - 3 * k) for v in values), (x, 2, x + 4, 6))
                name = f"{colour}-{side}-{k}.png"
                picture.save(folder / name)
                lines.append(json.dumps({"file_name": name, "text": f"A {colour} square on the {side}."}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def read(tmp, text, *overrides):
    (tmp / "squares.toml").write_text(text, "utf-8")
    return recipes.read(tmp / "squares.toml", overrides)


@pytest.fixture(scope="module")
def run(squares, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("run")
    return train(read(tmp, RECIPE.format(folder=squares)), tmp / "run")


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


# -- networks ----------------------------------------------------------------------------------------------------------


def reader(**settings):
    given = {"vocabulary": 7, "length": 6, "width": 16, "depth": 2, "heads": 2} | settings
    return shaken(seeded(Reader, **given).double()).eval()


def network():
    torch.manual_seed(0)
    made = Transformer((1, 4, 4), patch=2, width=16, depth=2, heads=2, channels=8, reader=Reader(7, 6, 16, 1, 2))
    return shaken(made.double()).eval()


def test_what_is_said_of_words_does_not_depend_on_the_padding():
    read_by = reader()
    vectors, ended = read_by(torch.tensor([[3, 1, 4]]))
    padded, ended_too = read_by(torch.tensor([[3, 1, 4, -1, -1]]))
    assert torch.allclose(padded[:, :4], vectors, atol=1e-12)
    assert ended.tolist() == [[False] * 4]
    assert ended_too.tolist() == [[False] * 4 + [True] * 2]


def test_the_order_of_words_counts_and_every_word_does():
    read_by = reader()
    whole = [read_by(torch.tensor([ids]))[0][0, 0] for ids in ([3, 1, 4], [4, 1, 3], [3, 1, 5])]
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    assert (whole[0] - whole[2]).abs().max() > 1e-3


def test_no_caption_is_the_empty_caption_in_every_form():
    x, t = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    asked = network()
    none = asked(x, t)
    for empty in (torch.full((2, 1), -1), torch.full((2, 6), -1)):
        assert torch.allclose(asked(x, t, empty), none, atol=1e-12)
    told = asked(x, t, torch.tensor([[3, 1, -1], [-1, -1, -1]]))
    assert (told[0] - none[0]).abs().max() > 1e-3
    assert torch.allclose(told[1], none[1], atol=1e-12)


def test_an_example_is_told_its_own_caption_alone():
    x, t = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    asked, captions = network(), torch.tensor([[3, 1, 4, -1], [2, -1, -1, -1]])
    both = asked(x, t, captions)
    for i in range(2):
        assert torch.allclose(asked(x[i : i + 1], t[i : i + 1], captions[i : i + 1])[0], both[i], atol=1e-12)


def test_patches_look_at_single_words_and_not_only_at_the_whole():
    """Truth: with the whole's own way in cut off, words still move the output; with both cut off, nothing does."""
    x, t = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    asked = network()

    def moved():
        with torch.no_grad():
            return (asked(x, t, torch.tensor([[3, 1]])) - asked(x, t, torch.tensor([[3, 2]]))).abs().max()

    with torch.no_grad():
        asked.captions.whole.weight.zero_()
    assert moved() > 1e-4
    with torch.no_grad():
        asked.captions.words.weight.zero_()
    assert moved() < 1e-12


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (torch.tensor([[7]]), "tokens are 0 to 6, or -1"),
        (torch.tensor([[-2]]), "tokens are 0 to 6, or -1"),
        (torch.zeros(1, 7, dtype=torch.int64), "at most 6 tokens, got 7"),
        (torch.tensor([3]), r"token ids \(B, L\)"),
        (torch.tensor([[0.5]]), r"token ids \(B, L\)"),
        (torch.tensor([[1], [2]]), "one caption for each of 1 examples expected, got 2"),
    ],
)
def test_what_is_no_caption_is_refused(condition, words):
    with pytest.raises(ValueError, match=words):
        network()(torch.zeros(1, 1, 4, 4, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64), condition)


def test_readers_of_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        Reader(7, 6, width=10, heads=4)
    with pytest.raises(ValueError, match="at least one token"):
        Reader(0, 6)
    assert Captions(Reader(7, 6, 16, 1, 2), 24).words.weight.shape == (24, 16)


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_leads_away_from_a_negative_prompt():
    """Truth: x0(c) + w (x0(c) - x0(n)), from three calls of the denoiser itself."""
    denoiser = ks.Denoiser(network(), ks.Process(ks.schedules.Cosine()), "x0")
    x, c, n = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([[3, 1], [2, -1]]), torch.tensor([5, -1])
    with torch.no_grad():
        given, away, free = (denoiser(x, 0.6, one).x0 for one in (c, n.expand(2, 2), None))
        guided = ClassifierFree(denoiser, 1.5, negative=n)(x, 0.6, c).x0
        assert torch.allclose(guided, given + 1.5 * (given - away), atol=1e-10)
        plain = ClassifierFree(denoiser, 1.5)(x, 0.6, c).x0
        assert torch.allclose(plain, given + 1.5 * (given - free), atol=1e-10)
    assert (guided - plain).abs().max() > 1e-3


@pytest.mark.parametrize("spacing", [LinearBetaTime(), UniformTime()])
def test_a_grid_may_begin_where_an_image_is(spacing):
    process = ks.Process(ks.schedules.Cosine())
    grid = spacing.grid(process, 5, 0.6)
    assert grid.times[0] == 0.6
    assert len(grid) == 5
    assert all(a > b for a, b in zip(grid.times, grid.times[1:], strict=False))
    assert spacing.grid(process, 5, 1.0) == spacing.grid(process, 5)
    with pytest.raises(ValueError, match=r"cannot begin at t = 1\.5"):
        spacing.grid(process, 5, 1.5)
    table = ks.Process(ks.schedules.linear_beta_table(10))
    assert spacing.grid(table, 3, 0.6).times[0] == 0.6
    with pytest.raises(ValueError, match=r"a grid of 7 steps cannot begin at t = 0\.6"):
        spacing.grid(table, 7, 0.6)


def test_samples_begin_with_an_image_under_noise():
    """Truth: one step of a denoiser that answers x_t itself is x_t: alpha x0 + sigma eps, by hand."""

    class Same(torch.nn.Module):
        process = ks.Process(ks.schedules.Cosine())

        def forward(self, x_t, t, condition=None):
            return ks.Prediction(self.process, t, x_t, "x0", x_t.clone())

    image = torch.linspace(-1, 1, 16).view(1, 4, 4)
    same = Same()
    table = ks.solvers.DDIM().table(same.process, ks.Grid((0.4,)))
    (found,) = ks.solvers.sample_batches(same, (1, 4, 4), table, seeds=[5, 7], begin=image)
    alpha, sigma = (float(v) for v in same.process.scales(0.4))
    assert torch.allclose(found, alpha * image + sigma * Noise([5, 7], (1, 4, 4)).draw(), atol=1e-6)
    with pytest.raises(ValueError, match="what they begin with has"):
        next(ks.solvers.sample_batches(same, (1, 4, 4), table, seeds=[5], begin=image[0]))


# -- runs --------------------------------------------------------------------------------------------------------------


def seen(levels):
    """The colour's name and the side of each picture, by hand: which channel is bright, and where."""
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    found = []
    for one in levels.float():
        left, right = one[:, 2:6, :4].mean((1, 2)), one[:, 2:6, 4:].mean((1, 2))
        side, bright = ("left", left) if left.sum() > right.sum() else ("right", right)
        found.append((names.get(tuple(int(v > 128) for v in bright)), side))
    return found


@pytest.mark.slow
def test_a_prompt_says_what_is_drawn(run):
    loaded = load(run.folder)
    assert isinstance(loaded.medium, CaptionedMedium)
    for prompt, wanted in (
        ("a blue square on the left", ("blue", "left")),
        ("A white square, on the right!", ("white", "right")),
    ):
        found = seen(loaded.sample(16, prompt=prompt, guidance=1.0))
        assert sum(one == wanted for one in found) >= 13, found
    several = loaded.sample(4, prompt=["a red square on the left", "a green square on the right"], guidance=1.0)
    assert seen(several)[0][1] == "left"
    assert seen(several)[1][1] == "right"


@pytest.mark.slow
def test_a_sample_is_told_its_own_prompt_whatever_the_batch(run):
    loaded = load(run.folder)
    prompts = ["a red square on the left", "a blue square on the right", "a green square on the left"]
    whole = loaded.sample(5, prompt=prompts, guidance=1.0)
    parts = loaded.sample(5, prompt=prompts, guidance=1.0, batch_size=2)
    assert (whole.int() - parts.int()).abs().max() <= 1


@pytest.mark.slow
def test_the_command_line_draws_prompts_and_says_which(run, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square on the left\n\na blue square on the right\n", "utf-8")
    assert main(["sample", str(run.folder), "--prompts", str(prompts), "--out", str(tmp_path / "a")]) == 0
    said = json.loads((tmp_path / "a" / "samples.json").read_text("utf-8"))
    assert [one["prompt"] for one in said["samples"]] == ["a red square on the left", "a blue square on the right"]
    assert (tmp_path / "a" / "seed-000001-a-blue-square-on-the-right.png").is_file()
    words = ("--prompt", "a red square", "--negative", "blue", "--guidance", "1", "--out", tmp_path / "b.png", "-n", 1)
    assert main(["sample", str(run.folder), *map(str, words)]) == 0
    assert Image.open(tmp_path / "b.png").text["prompt"] == "a red square"
    assert Image.open(tmp_path / "b.png").text["negative"] == "blue"


@pytest.mark.slow
def test_an_image_under_little_noise_stays_what_it_is(run, squares):
    loaded = load(run.folder)
    image = squares / "red-left-0.png"
    little = loaded.sample(4, image=image, strength=0.1, prompt="a red square on the left")
    given = loaded.medium.outputs(loaded.medium.read_one(image))
    assert (little.int() - given.int()).abs().float().mean() < 25
    much = loaded.sample(8, image=image, strength=0.95, prompt="a blue square on the right", guidance=2.0)
    assert sum(one == ("blue", "right") for one in seen(much)) >= 6


@pytest.mark.slow
def test_what_cannot_be_asked_for_is_refused(run, squares, tmp_path, capsys):
    folder, picture = run.folder, squares / "red-left-0.png"
    Image.new("L", (5, 8)).save(tmp_path / "small.png")
    (tmp_path / "none.txt").write_text("\n \n", "utf-8")
    long = " ".join(["red"] * 10_000)
    for words, message in (
        (("--prompt", long), r"at most 10 tokens, and 'red red .*\.\.\.' has 10,000"),
        (("--prompt", "zebra"), "no word of 'zebra' is among those"),
        (("--prompts", tmp_path / "none.txt"), "holds no prompts"),
        (("--prompts", tmp_path / "none.txt", "--prompt", "red"), "one prompt, or a file"),
        (("--negative", "red"), "needs a guidance weight"),
        (("--strength", "0.5"), "needs an image"),
        (("--image", picture, "--strength", "1.5"), "strength lies between 0"),
        (("--image", tmp_path / "no.png"), "cannot be read as a picture"),
        (("--known", picture, "--mask", tmp_path / "small.png"), "has 8 x 8 pixels and the mask .* 5 x 8"),
        (("--class", "red"), "none can be asked for; give a prompt"),
        (("--image", picture, "--solver", "tuned"), "tuned from noise on"),
        (("--image", picture, "--grid", "1,0.5"), "begins at t = 1 leaves nothing of an image"),
        (("--image", picture, "--grid", "0.7,0.5", "--strength", "0.5"), "drop strength, or the grid"),
    ):
        assert re.search(message, refused(capsys, "sample", folder, *words)), words


@pytest.mark.slow
def test_levels_are_no_pixels(run):
    with pytest.raises(ValueError, match=r"image has pixels in \[-1, 1\], got torch.uint8"):
        run.sample(1, prompt="red", image=torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.mark.slow
def test_unknown_words_of_many_prompts_are_said_in_one_line(run, capsys):
    run.medium.conditions(["red zebra", "red", "yak blue", "blue auk"])
    said = capsys.readouterr().err
    assert said == "'red zebra': 1 of 2 words are not known to the model, nor all of 2 more prompts\n"
    run.medium.conditions(["red", "blue"])
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_kept_captions_are_cut_and_may_have_unknown_words(run, tmp_path):
    """As in training, and unlike prompts, which are refused then."""
    shutil.copytree(run.folder, tmp_path / "run")
    prompts = ["a red square on the left " * 5, "zebra", "a blue square"]
    (tmp_path / "run" / "prompts.json").write_text(json.dumps(prompts), "utf-8")
    loaded = load(tmp_path / "run")
    told = loaded.labels_for(4)
    assert told.shape == (4, 10)
    assert (told[0] >= 0).all()
    assert torch.equal(told[3], told[0])
    assert loaded.sample(4).shape == (4, 3, 8, 8)


@pytest.mark.slow
def test_a_weaker_run_reads_captions_as_the_same_tokens(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    assert load(run.folder).sampler(weak=tmp_path / "other", guidance=1.0) is not None
    file.write_text(file.read_text("utf-8").replace('"red"', '"crimson"'), "utf-8")
    with pytest.raises(ValueError, match="reads captions as other tokens"):
        load(run.folder).sampler(weak=tmp_path / "other", guidance=1.0)


@pytest.mark.slow
def test_a_model_without_captions_has_nothing_to_prompt(run, squares, tmp_path, capsys):
    text = RECIPE.format(folder=squares).replace("[data.captions]\nlength = 10\nvocabulary = 40\n", "")
    text = text[: text.index("[reader]")] + text[text.index("[process]") :]
    plain = train(read(tmp_path, text, "training.steps=2"), tmp_path / "plain")
    assert "it has no prompt to choose" in refused(capsys, "sample", plain.folder, "--prompt", "red")
    assert "nothing to prompt" in refused(capsys, "sample", plain.folder, "--guidance", 1, "--negative", "red")


@pytest.mark.slow
def test_a_captioned_run_is_measured_tuned_and_reported(run, capsys):
    assert main(["evaluate", str(run.folder), "--bound"]) == 0
    given = json.loads((run.folder / "evaluation.json").read_text("utf-8"))["bits_per_dim"]["total"]
    assert main(["evaluate", str(run.folder), "--bound", "--unconditional"]) == 0
    found = json.loads((run.folder / "evaluation-unconditional.json").read_text("utf-8"))
    assert given < found["bits_per_dim"]["total"]  # what a picture shows is told in advance
    tune = ("--guidance", "1", "--pairs", "16", "--iterations", "2", "--fine", "12", "--batch-size", "8")
    assert main(["tune", str(run.folder), "--steps", "3", *tune]) == 0
    assert load(run.folder).sampler(steps=3, guidance=1.0).how["solver"].startswith("tuned")
    assert main(["report", str(run.folder)]) == 0
    assert "square on the" in (run.folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("sampling.guidance=1", "training.label_drop=0"), "leads away from the empty caption"),
        (("data.conditional=true",), "told in the place of classes"),
        (("data.captions.length=0",), "greater than or equal to 1"),
        (("network.kind=mlp",), "mlp cannot be told captions"),
        (("reader.heads=5",), "width must be a multiple of heads"),
        (("data.captions.pretrained=nowhere",), r"\[reader\] is of an encoder of captions that is trained"),
    ],
)
def test_a_recipe_of_captions_that_cannot_be_is_refused(squares, tmp_path, change, words):
    with pytest.raises(RecipeError, match=words):
        train(read(tmp_path, RECIPE.format(folder=squares), *change), tmp_path / "run")


def test_a_reader_without_captions_is_refused(squares, tmp_path):
    text = RECIPE.format(folder=squares).replace("[data.captions]\nlength = 10\nvocabulary = 40\n", "")
    with pytest.raises(RecipeError, match=r"it needs data\.captions"):
        read(tmp_path, text)


@pytest.mark.slow
def test_codes_are_prompted_inpainted_and_begun_with_an_image(squares, tmp_path):
    """Latent: where a picture is held it comes back to the last bit; elsewhere the prompt decides."""
    text = RECIPE.format(folder=squares)
    first = text[: text.index("[data.captions]")] + AUTOENCODER + '[objective]\nkind = "elbo"\nbeta = 0.1\n'
    first += text[text.index("[training]") : text.index("[sampling]")] + text[text.index("[evaluation]") :]
    codes = train(read(tmp_path, first, "training.steps=250"), tmp_path / "codes")
    assert codes.evaluate(quality=False)["reconstruction"]["times_fewer"] == pytest.approx(3)
    second = text.replace("[process]", AUTOENCODER + "\n[process]")
    second = second.replace('kind = "simple"', 'kind = "latent"\nweighting = { kind = "plain", form = "v" }')
    second = second.replace("steps = 8", "steps = 8\nclip = false")
    start = f"training.start={tmp_path / 'codes'}"
    run = train(read(tmp_path, second, start, "training.steps=300"), tmp_path / "run")
    loaded = load(run.folder)
    assert isinstance(loaded, LatentRun)
    found = seen(loaded.sample(12, prompt="a blue square on the left", guidance=1.0))
    assert sum(one == ("blue", "left") for one in found) >= 9, found
    picture = loaded.medium.read_one(squares / "red-left-0.png")
    mask = torch.zeros(3, 8, 8, dtype=torch.bool)
    mask[:, :, :5] = True
    held = loaded.sample(4, known=picture, mask=mask, prompt="a red square on the left")
    assert torch.equal(held[:, mask], loaded.medium.outputs(picture)[mask].expand(4, -1))
    assert loaded.mask_of(mask)[0].tolist() == [[True, True, False, False]] * 4
    with pytest.raises(ValueError, match="a code stands for 2 x 2 pixels, and of no code all are held"):
        loaded.mask_of(torch.zeros(3, 8, 8, dtype=torch.bool).index_fill(2, torch.tensor([0, 3]), True))
    little = loaded.sample(2, image=picture, strength=0.1, prompt="a red square on the left")
    assert seen(little) == [("red", "left")] * 2


# -- a pretrained reader -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny text encoder as the library transformers saves one, random weights."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *COLOURS, "a", "square", "on", "the", "left", "right"]
    library = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_pretrained_reader_says_what_the_encoder_says_and_reads_each_caption_once(encoder):
    """Truth: the encoder called by hand, caption by caption, without padding."""
    from transformers import AutoModel

    from kuosan.networks.captions import Pretrained

    by_hand = AutoModel.from_pretrained(encoder).eval()
    made = Pretrained(str(encoder), 8).train()
    ids = torch.tensor([[4, 9, 8, -1], [5, -1, -1, -1], [-1, -1, -1, -1]])
    vectors, ended = made(ids)
    for row, n in ((0, 3), (1, 1)):
        with torch.no_grad():
            said = by_hand(input_ids=ids[row : row + 1, :n]).last_hidden_state[0]
        assert torch.allclose(vectors[row, 1 : 1 + n], said, atol=1e-5)
        assert torch.allclose(vectors[row, 0], said.mean(0), atol=1e-5)
    assert vectors[2].abs().max() == 0
    assert ended.sum(1).tolist() == [1, 3, 4]
    few = Pretrained(str(encoder), 8, remembered=1)  # forgets between and within batches, and says the same
    assert torch.allclose(few(ids[:1])[0], vectors[:1], atol=1e-5)
    assert torch.allclose(few(ids)[0], vectors, atol=1e-5)
    made.encoder.forward = None  # so that asking again would fail
    assert torch.equal(made(ids)[0], vectors)
    assert not any(p.requires_grad for p in made.parameters())


def test_what_is_no_encoder_is_refused(encoder, tmp_path):
    from kuosan.networks.captions import Pretrained

    with pytest.raises(ValueError, match="no folder, and no installed package"):
        Pretrained("no-such-encoder", 8)
    with pytest.raises(ValueError, match=r"it has no config.json"):
        Pretrained(str(tmp_path), 8)
    (tmp_path / "config.json").write_bytes((encoder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="a pickle could run any code"):
        Pretrained(str(tmp_path), 8)
    (tmp_path / "model.safetensors").write_bytes((encoder / "model.safetensors").read_bytes())
    (tmp_path / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="code of its own"):
        Pretrained(str(tmp_path), 8)
    (tmp_path / "modeling.py").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil/repo--m.M"}}))
    with pytest.raises(ValueError, match="auto_map"):
        Pretrained(str(tmp_path), 8)


@pytest.mark.slow
def test_a_run_with_a_pretrained_reader_is_prompted(squares, encoder, tmp_path):
    text = RECIPE.format(folder=squares)
    text = text[: text.index("[reader]")] + text[text.index("[process]") :]
    text = text.replace("vocabulary = 40", f'pretrained = "{encoder}"')
    run = train(read(tmp_path, text), tmp_path / "run")
    assert (run.folder / "tokenizer" / "tokenizer.json").is_file()
    found = seen(load(run.folder).sample(12, prompt="a blue square on the left", guidance=1.0))
    assert sum(one == ("blue", "left") for one in found) >= 9, found

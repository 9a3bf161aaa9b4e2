"""The report: a page that needs nothing else and says what report.json says."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from kuosan import figures
from kuosan import recipe as recipes
from kuosan.image.pictures import to_image
from kuosan.measurements.diffusion import TEMPERATURES
from kuosan.report import ReportError, write_report
from kuosan.runs import load
from kuosan.train import train
from pages import Page, written

SECTIONS = ["samples", "way", "loss", "bound", "evaluations", "temperature", "neighbours", "provenance"]
TINY = [
    "training.steps=30",
    "training.batch_size=32",
    "training.precision=float32",
    "training.warmup=5",
    "sampling.steps=4",
    "evaluation.bound_steps=40",
]


def trained(folder, name, *overrides):
    train(recipes.read(name, [*TINY, *overrides]), folder)
    return load(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits, hardly trained, unconditional."""
    return trained(tmp_path_factory.mktemp("runs") / "digits", "digits", "network.width=32", "network.depth=1")


@pytest.fixture(scope="module")
def page(digits):
    return Page(write_report(digits, budget=0.5))


@pytest.fixture(scope="module")
def numbers(digits, page):
    return written(digits)


@pytest.fixture
def pictures(tmp_path):
    """24 noisy coloured squares in one folder: images without classes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(24):
        shade = rng.integers(0, 200, 3)
        Image.fromarray((shade + rng.integers(0, 50, (9, 9, 3))).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_the_page_loads_nothing_from_anywhere(page):
    page.check_alone()


def test_the_page_has_every_section_in_order(page):
    assert [attributes["id"] for attributes in page.of("section")] == SECTIONS


def test_every_figure_has_a_caption(page):
    assert len(page.of("figure")) == len(page.of("figcaption")) >= 8


def test_every_embedded_picture_decodes(page):
    """Pillow is the judge; one of them moves."""
    found = page.images()
    for image in found:
        image.load()
    assert [image.format for image in found].count("GIF") == 1
    assert next(image for image in found if image.format == "GIF").n_frames > 1


def test_no_two_elements_have_one_id(page):
    """HTML wants ids unique; plots of one page come from one program and would share theirs."""
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_numbers_on_the_page_are_those_of_the_json(page, numbers):
    """Each marked number carries its name in report.json; what is printed is that value, rounded."""
    assert len(page.numbers) > 80
    for name, value, words in page.numbers:
        truth = numbers
        for part in name.split("."):
            truth = truth[int(part)] if isinstance(truth, list) else truth[part]
        assert float(value) == truth, name
        printed = float(words.replace(",", "").replace("−", "-").rstrip("\u202f%"))
        assert printed / (100 if "%" in words else 1) == pytest.approx(truth, rel=6e-3, abs=6e-4), name


def test_the_samples_shown_are_those_that_the_run_draws(digits, page):
    """Truth: run.sample with the seeds that the page states, 0 to 63."""
    shown = page.images("sample, seed")[:64]
    for image, levels in zip(shown, digits.sample(64), strict=True):
        assert np.array_equal(np.asarray(image.convert("L")), np.asarray(to_image(levels, digits.levels)))


def test_the_way_from_noise_to_data_ends_in_the_first_sample(page):
    """It is re-run with another function than sampling, so this says that both do the same."""
    assert np.array_equal(
        np.asarray(page.images("state at")[-1].convert("L")), np.asarray(page.images("sample, seed 0")[0].convert("L"))
    )


def test_one_evaluation_and_temperature_zero_are_among_what_is_measured(numbers):
    evaluations = [point["evaluations"] for point in numbers["evaluations"]["points"]]
    assert evaluations[:4] == [1, 2, 3, 5]  # more of them where time allows
    assert [point["temperature"] for point in numbers["temperature"]["points"]] == list(TEMPERATURES)


def test_the_curve_of_matching_terms_sums_to_the_bound(numbers):
    """Prior and matching summed from noise to data, as the plot ends, are the table's two terms."""
    bits = numbers["bits_per_dim"]
    for split in ("held_out", "train"):
        assert bits["curve"][f"{split}_sum"][0] == pytest.approx(bits[split]["prior"] + bits[split]["matching"])


def test_an_evaluation_of_this_step_is_used_and_one_of_another_step_is_not(digits, numbers):
    kept = digits.folder / "evaluation.json"
    quality = numbers["quality"] | {"confident": 0.125, "guidance": 0.0}
    evaluation = {"step": digits.step, "bits_per_dim": numbers["bits_per_dim"]["held_out"] | {"total": 7.5}}
    try:
        for step, found in ((digits.step, True), (digits.step - 1, False)):
            kept.write_text(json.dumps(evaluation | {"step": step, "quality": quality}))
            write_report(digits, budget=0.2)
            found_then = written(digits)
            assert (found_then["bits_per_dim"]["held_out"]["total"] == 7.5) is found
            assert (found_then["quality"]["confident"] == 0.125) is found
    finally:
        kept.unlink()


def test_a_conditional_run_has_a_row_for_each_class(tmp_path):
    settings = ("data.conditional=true", "network.width=16", "network.depth=1")
    run = trained(tmp_path / "run", "digits", *settings)
    page = Page(write_report(run, budget=0.2))
    shown = [a["alt"] for a in page.of("img") if a["alt"].startswith("sample of")]
    columns = len(shown) // 10
    assert columns >= 6
    assert shown == [f"sample of {c}, seed {c + 10 * k}" for c in range(10) for k in range(columns)]
    assert json.loads((run.folder / "report.json").read_text("utf-8"))["quality"]["agreement"] is not None


def test_images_without_classes_have_a_report_without_a_judge(tmp_path, pictures):
    network = 'network={kind="mlp", width=16, depth=1}'
    denoiser = 'denoiser={predicts="v"}'
    objective = 'objective={kind="simple"}'
    variance = "evaluation.variance=beta"  # the recipe's own needs a network that predicts levels
    data = f'data={{folder="{pictures}", size=8, held_out=0.2}}'
    run = trained(tmp_path / "run", "digits", network, denoiser, objective, variance, data)
    page = Page(write_report(run, budget=0.2))
    written = json.loads((run.folder / "report.json").read_text("utf-8"))
    assert [attributes["id"] for attributes in page.of("section")] == SECTIONS
    assert "There is no judge for these images" in page.source
    assert written["quality"] is None
    assert set(written["evaluations"]["points"][0]) == {"evaluations", "nearest", "contrast"}


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(digits, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # makes `import package` raise ModuleNotFoundError
    with pytest.raises(ReportError, match=rf"{package}: pip install 'kuosan\[report\]'"):
        write_report(digits)


def test_a_budget_of_no_time_is_refused(digits):
    with pytest.raises(ReportError, match="budget"):
        write_report(digits, budget=0)


def neighbours(ours, real, share=0.05, copies=0):
    middle = [{"quantile": 0.5, "samples": ours, "held_out": real}]
    found = {"samples": 100, "held_out": 100, "copies": copies, "copies_of_real": 0, "quantiles": middle}
    return found | {"nearer_than_95_percent_of_held_out": share}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (neighbours(2.0, 2.0), "No sign of memorisation"),
        (neighbours(3.0, 2.0, share=0.0), "not yet quite like the data"),
        (neighbours(1.2, 2.0, share=0.6), "lean on training images"),
        (neighbours(1.6, 2.0, share=0.06), "no sign of copies"),
        (neighbours(0.0, 2.0, share=0.9, copies=80), "80 of 100 samples are exact copies"),
    ],
    ids=["as far as real ones", "further", "nearer", "on average nearer", "copies"],
)
def test_the_conclusion_on_memorisation_follows_the_numbers(found, says):
    assert says in figures.conclusion(found)


def test_the_moving_average_of_a_line_is_the_line():
    """A centred window of any width averages a linear function to itself; at both ends it shrinks to one value."""
    line = np.arange(50.0) * 0.3 + 2
    np.testing.assert_allclose(figures.smooth(line, 9), line)


def test_a_zero_has_no_sign_and_a_share_is_in_per_cent():
    number = figures.marked({"zero": -0.0, "share": 0.1234, "none": None, "list": [{"below": -1.5}]})
    assert ">0.00<" in number("zero", ".2f")
    assert ">12.3\u202f%<" in number("share", ".1%")
    assert ">−1.5<" in number("list.0.below", ".1f")
    assert number("none", ".1f") == "not known"

"""Measures of made waves against truths by hand, scipy and numpy; the recogniser on silence and on real prompts."""

import gzip
import json
import math
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch

pytest.importorskip("librosa")
pytest.importorskip("jiwer")
pytest.importorskip("pocketsphinx")

from kuosan.fetch import cache_folder
from kuosan.plain import plain
from kuosan.speech.analysis import Analysis
from kuosan.speech.judge import (
    Quality,
    Recogniser,
    judge,
    log_spectral_distance,
    mel_cepstral_distortion,
    mel_l1,
    real_time_factor,
    word_error_rate,
)

A = Analysis()
MEASURES = (mel_l1, log_spectral_distance, mel_cepstral_distortion)


def noise(rows, n, seed=0):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def recogniser():
    return Recogniser()


def test_a_recogniser_with_choices_hears_one_of_them_or_nothing():
    buzz = 0.2 * torch.sin(torch.arange(8000) * 0.05) * torch.sin(torch.arange(8000) * 3e-4)
    assert Recogniser(["yes", "no thanks"])(buzz) in ("yes", "no thanks", "")
    for wrong in ("", "no xqzzt"):
        with pytest.raises(ValueError, match="does not know the word"):
            Recogniser(["yes", wrong])


@pytest.mark.parametrize("measure", MEASURES)
def test_equal_waves_are_not_apart_and_the_order_does_not_matter(measure):
    x, y = noise(2, 4000), noise(2, 4000, seed=1)
    assert measure(x, x, A).tolist() == [0, 0]
    torch.testing.assert_close(measure(x, y, A), measure(y, x, A))
    assert measure(x, y, A).shape == (2,)
    torch.testing.assert_close(measure(x, y, A)[1:], measure(x[1:], y[1:], A))


@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0])
def test_a_louder_wave_is_as_far_as_it_is_louder(scale):
    """Every logarithm moves by log scale; the cepstra from the first on do not move at all."""
    x = noise(2, 4000)
    decibels = torch.full((2,), abs(20 * math.log10(scale)), dtype=torch.float64)
    torch.testing.assert_close(log_spectral_distance(x, scale * x, A), decibels, rtol=1e-9, atol=0)
    nats = torch.full((2,), abs(math.log(scale)), dtype=torch.float64)
    torch.testing.assert_close(mel_l1(x, scale * x, A), nats, rtol=1e-9, atol=0)
    torch.testing.assert_close(mel_cepstral_distortion(x, scale * x, A), torch.zeros(2).double(), rtol=0, atol=1e-8)


def test_spectra_are_as_far_apart_as_numpy_says():
    """A root of a mean over frequencies, then a mean over frames; numpy's own frames."""
    x, y = noise(1, 3000), 0.1 * noise(1, 3000, seed=1)
    window = np.sin(np.pi * np.arange(1024) / 1024) ** 2

    def decibels(wave):
        padded = np.pad(wave[0].numpy(), 512)
        frames = np.stack([padded[k * 256 : k * 256 + 1024] for k in range(12)])
        return 20 * np.log10(np.abs(np.fft.rfft(frames * window)))  # (T, F)

    truth = np.sqrt(((decibels(x) - decibels(y)) ** 2).mean(axis=1)).mean()
    assert float(log_spectral_distance(x, y, A)) == pytest.approx(truth, rel=1e-9)


def test_two_draws_of_one_noise_are_eight_decibels_apart():
    """|X|^2 of noise is exponential, with a logarithm of variance pi^2 / 6: 10 / ln 10 sqrt(pi^2 / 3) = 7.88 dB."""
    found = log_spectral_distance(noise(1, 160000), noise(1, 160000, seed=1), A)
    assert float(found) == pytest.approx(10 / math.log(10) * math.sqrt(math.pi**2 / 3), rel=0.01)


@pytest.mark.parametrize("cepstra", [1, 13, 24, 79])
def test_cepstra_are_as_far_apart_as_scipy_s(cepstra):
    x, y = noise(2, 3000), 0.1 * noise(2, 3000, seed=1)
    c = scipy.fft.dct(A.mel(x).numpy(), axis=1, norm="ortho") - scipy.fft.dct(A.mel(y).numpy(), axis=1, norm="ortho")
    truth = 10 / np.log(10) * np.sqrt(2 * (c[:, 1 : cepstra + 1] ** 2).sum(axis=1)).mean(axis=1)
    np.testing.assert_allclose(mel_cepstral_distortion(x, y, A, cepstra), truth, rtol=1e-9)


def test_thirteen_cepstra_unless_told():
    x, y = noise(1, 3000), noise(1, 3000, seed=1)
    assert mel_cepstral_distortion(x, y, A) == mel_cepstral_distortion(x, y, A, 13)
    for wrong in (0, 80):
        with pytest.raises(ValueError, match=r"cepstra must lie in 1 \.\. 79"):
            mel_cepstral_distortion(x, y, A, wrong)


def test_mels_are_as_far_apart_as_their_mean_says():
    x, y = noise(2, 3000), 0.1 * noise(2, 3000, seed=1)
    truth = np.abs(A.mel(x).numpy() - A.mel(y).numpy()).mean(axis=(1, 2))
    np.testing.assert_allclose(mel_l1(x, y, A), truth, rtol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_silence_is_finitely_far(measure):
    """The floor: silence against noise, and against itself."""
    silence = torch.zeros(1, 3000).double()
    assert 0 < float(measure(noise(1, 3000), silence, A)) < 200
    assert float(measure(silence, silence, A)) == 0
    louder = replace(A, floor=1e-2)
    assert float(measure(1e-7 * noise(1, 3000), silence, louder)) == 0


@pytest.mark.parametrize("measure", MEASURES)
def test_waves_that_are_not_aligned_are_refused(measure):
    with pytest.raises(ValueError, match=r"\(1, 3000\) and \(1, 2999\) are not aligned"):
        measure(noise(1, 3000), noise(1, 2999), A)
    with pytest.raises(ValueError, match="at least 1 sample"):
        measure(noise(1, 0), noise(1, 0), A)


@pytest.mark.parametrize(
    ("text", "heard", "errors"),
    [
        ("the cat sat", "the cat sat", 0),
        ("The cat sat.", "the bat sat", 1 / 3),  # substituted
        ("the cat sat", "the sat", 1 / 3),  # deleted
        ("the cat sat", "the black cat sat", 1 / 3),  # inserted
        ("the cat sat", "", 1),
        ("stop", "do not stop it now", 4),  # more than one error a word
        ("a b c d", "b c d a", 2 / 4),  # one deleted and one inserted, not four substituted
    ],
)
def test_errors_are_the_fewest_changes(text, heard, errors):
    rate, error = word_error_rate([text], [heard])
    assert rate == pytest.approx(errors)
    assert math.isnan(error)


def test_all_words_count_alike():
    """3 errors in 1 + 3 + 0 words: a rate of 3 / 4, not the mean of the rates; an empty text may have insertions."""
    rate, _ = word_error_rate(["stop", "the cat sat", "..."], ["go", "the cat", "oh"])
    assert rate == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="no words"):
        word_error_rate(["...", ""], ["a", "b"])
    with pytest.raises(ValueError, match="2 texts do not fit 1 utterances"):
        word_error_rate(["a", "b"], ["a"])


def test_the_error_of_a_rate_is_that_of_a_ratio():
    """numpy: the spread of rates over 4,000 sets of 60 utterances of 1 to 12 words, of which some are hard."""
    chance = np.random.default_rng(0)

    def drawn():
        words = chance.integers(1, 13, 60)
        return words, chance.binomial(words, chance.choice([0.05, 0.6], 60))

    spread = np.std([(e.sum() / n.sum()) for n, e in (drawn() for _ in range(4000))])
    found = []
    for _ in range(40):
        words, errors = drawn()
        texts = [" ".join("a" * n) for n in words]
        heard = [" ".join("b" * e + "a" * (n - e)) for n, e in zip(words, errors, strict=True)]
        rate, error = word_error_rate(texts, heard)
        assert rate == pytest.approx(errors.sum() / words.sum())
        found.append(error)
    assert np.mean(found) == pytest.approx(spread, rel=0.05)


def test_of_texts_of_one_length_the_error_is_the_usual_one():
    """n equal everywhere: the standard error of the mean of the rates, by numpy."""
    texts = ["a b c d"] * 5
    heard = ["a b c d", "a b c", "x y c d", "a b c d e", "q"]
    rates = np.array([0, 1, 2, 1, 4]) / 4
    rate, error = word_error_rate(texts, heard)
    assert rate == pytest.approx(rates.mean())
    assert error == pytest.approx(rates.std(ddof=1) / math.sqrt(5))


def test_a_real_time_factor_is_clock_over_sound():
    calls = []

    def make():
        calls.append(0)
        time.sleep(0.05)
        return torch.zeros(2, 800)  # 0.1 s at 16 kHz

    assert 0.5 <= real_time_factor(make, 16000) < 1.5
    assert len(calls) == 4
    assert real_time_factor(lambda: (time.sleep(0.01), torch.zeros(16000))[1], 16000, repeats=1) < 0.1
    with pytest.raises(ValueError, match="nothing was made"):
        real_time_factor(lambda: torch.zeros(0), 16000)
    with pytest.raises(ValueError, match="at least 1, got 16000 and 0"):
        real_time_factor(make, 16000, repeats=0)


class Parrot:
    """Hears as many words "a" as there are tenths of a second."""

    rate = 16000

    def __call__(self, wave):
        assert wave.ndim == 1
        return " ".join("a" * (len(wave) // 1600))


def test_a_judge_s_means_and_errors_are_numpy_s():
    natural = [noise(1, n, seed=n)[0].float() for n in (3200, 4800, 8000, 6400)]
    made = [0.5 * torch.cat([x, x.new_ones(300)]) + 0.1 for x in natural[:3]] + [natural[3][:-200]]
    texts = ["A a", "a A a b", "b", "a, a a"]  # heard: 2, 3, 5, and 3 where 6,200 samples are left
    found = judge(natural, made, texts, A, Parrot())
    cut = [(x[: len(y)].double()[None], y[: len(x)].double()[None]) for x, y in zip(natural, made, strict=True)]
    for measure in MEASURES:
        values = np.array([float(measure(x, y, A)) for x, y in cut])
        assert getattr(found, measure.__name__) == pytest.approx(values.mean(), rel=1e-9)
        assert getattr(found, f"{measure.__name__}_error") == pytest.approx(values.std(ddof=1) / 2, rel=1e-9)
    assert found.utterances == 4
    assert found.seconds == pytest.approx((3200 + 4800 + 8000 + 6200) / 16000)
    expected = word_error_rate(texts, ["a a", "a a a", "a a a a a", "a a a"])
    assert (found.word_error_rate, found.word_error_rate_error) == expected == (pytest.approx(6 / 10), expected[1])
    json.dumps(plain(found.__dict__), allow_nan=False)


def test_the_natural_waves_are_their_own_limit():
    waves = [noise(1, n)[0] for n in (2000, 3000)]
    found = judge(waves, waves, None, A)
    assert found == Quality(2, 5000 / 16000, 0, 0, 0, 0, 0, 0)
    assert math.isnan(judge(waves[:1], waves[:1], None, A).mel_l1_error)


def test_the_made_waves_are_heard_and_what_nobody_knows_the_words_of_is_not():
    """A recogniser that tells waves by their level; of the second one no text is known."""
    heard = {1.0: "one", 2.0: "two"}
    natural, made = ([torch.full((3200,), level)] * 3 for level in (1.0, 2.0))
    found = judge(natural, made, ["one", "", "two"], A, lambda wave: heard[float(wave[0])])
    assert found.word_error_rate == 0.5
    assert found.utterances == 3


@pytest.mark.parametrize(
    ("natural", "made", "texts", "message"),
    [
        ([], [], None, "there are no waves"),
        ([noise(1, 900)[0]], [], None, "1 natural waves do not fit 0 made ones"),
        ([noise(1, 900)], [noise(1, 900)], None, r"natural wave 0 should be \(N,\) of real numbers, got \(1, 900\)"),
        ([noise(1, 900)[0]], [torch.zeros(0)], None, "made wave 0 is empty"),
        ([noise(1, 900)[0]], [torch.full((900,), math.nan)], None, "made wave 0 has samples that are not finite"),
        ([torch.full((900,), math.inf)], [torch.ones(900)], None, "natural wave 0 has samples that are not finite"),
        ([torch.ones(2000)], [torch.ones(3025)], None, "natural wave 0 has 2000 samples and the made one 3025"),
        ([torch.ones(900)], [torch.ones(900, dtype=torch.int16)], None, "made wave 0 should be"),
    ],
)
def test_waves_that_cannot_be_judged_say_which(natural, made, texts, message):
    with pytest.raises(ValueError, match=message):
        judge(natural, made, texts, A)


def test_a_recogniser_needs_texts_and_its_own_rate():
    wave = [noise(1, 900)[0]]
    for texts in (None, ["a", "b"]):
        with pytest.raises(ValueError, match="a text for each of the 1 waves"):
            judge(wave, wave, texts, A, Parrot())
    with pytest.raises(ValueError, match="expects 16000 samples a second, the waves have 8000"):
        judge(wave, wave, ["a"], Analysis(rate=8000, high=4000, mels=20), Parrot())


@pytest.mark.parametrize("n", [1, 100, 12000])
def test_nothing_is_heard_in_silence(recogniser, n):
    assert recogniser(torch.zeros(n)) == ""
    assert recogniser(torch.full((n,), 1e-6)) == ""


def test_waves_that_cannot_be_heard_say_why(recogniser):
    with pytest.raises(ValueError, match="the wave is empty"):
        recogniser(torch.zeros(0))
    with pytest.raises(ValueError, match="not finite"):
        recogniser(torch.full((100,), math.nan))
    with pytest.raises(ValueError, match=r"\(N,\) of real numbers"):
        recogniser(torch.zeros(1, 100))


@pytest.mark.parametrize(
    ("module", "call"),
    [("pocketsphinx", Recogniser), ("jiwer", lambda: word_error_rate(["a"], ["a"]))],
)
def test_without_a_library_it_says_what_to_install(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}: pip install 'kuosan\[speech\]'"):
        call()


@pytest.fixture(scope="module")
def prompts():
    """(text, wave) of short prompts of the cached data; skipped where there are none or no decoder."""
    av = pytest.importorskip("av")
    root = cache_folder() / "asterisk-en"
    written = [*root.glob("**/core-sounds-en.txt.gz")]
    sounds = {file.stem: file for file in root.glob("**/*.g722")}
    if not written or not sounds:
        pytest.skip("the prompts are not in the cache: kuosan fetch asterisk-en")
    lines = gzip.decompress(written[0].read_bytes()).decode().splitlines()
    texts = dict(line.split(": ", 1) for line in lines if ": " in line)
    found = []
    for name in ("all-circuits-busy-now", "conf-locked", "vm-goodbye"):
        with av.open(str(sounds[name]), format="g722") as sound:
            levels = np.concatenate([frame.to_ndarray().reshape(-1) for frame in sound.decode(audio=0)])
        found.append((texts[name], torch.from_numpy(levels / 32768.0)))
    return found


@pytest.mark.slow
def test_words_of_real_prompts_are_heard_whatever_was_heard_before(recogniser, prompts):
    texts, waves = zip(*prompts, strict=True)
    forwards = [recogniser(wave) for wave in waves]
    backwards = [recogniser(wave.float()) for wave in waves[::-1]][::-1]
    assert backwards == forwards
    assert word_error_rate(texts, forwards)[0] < 0.5
    assert recogniser(9 * waves[-1]) == recogniser((9 * waves[-1]).clamp(-1, 1))


@pytest.mark.slow
def test_griffin_lim_is_better_with_iterations_on_real_prompts(prompts):
    """As tabulated: a mel-L1 of about .31 after one iteration and .16 after 32, 13.6 and 9.3 dB of cepstra."""
    texts, waves = zip(*prompts, strict=True)
    found = []
    for iterations in (1, 32):
        made = [A.griffin_lim(A.magnitude(A.mel(wave[None])), iterations, n=len(wave))[0] for wave in waves]
        found.append(judge(waves, made, texts, A))
    one, many = found
    assert one.mel_l1 == pytest.approx(0.31, abs=0.04)
    assert many.mel_l1 == pytest.approx(0.16, abs=0.03)
    assert one.mel_cepstral_distortion == pytest.approx(13.6, abs=1.5)
    assert many.mel_cepstral_distortion == pytest.approx(9.3, abs=1.2)
    assert many.log_spectral_distance < one.log_spectral_distance

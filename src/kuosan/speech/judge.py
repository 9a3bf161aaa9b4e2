"""How near made waves are to natural ones, frame by frame, and how well they are understood by a recogniser."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from kuosan.speech.analysis import Analysis
from kuosan.speech.words import normalised

CEPSTRA = 13  # of the mel-cepstral distortion


@dataclass(frozen=True)
class Quality:
    """What `judge` finds in made waves; every `*_error` is a standard error over utterances, NaN of a single one.

    Attributes:
        utterances: how many pairs of waves were judged.
        seconds: how long they are together, after cutting.
        mel_l1: the mean of `mel_l1` over utterances, each counted once however long it is.
        log_spectral_distance: likewise, in dB.
        mel_cepstral_distortion: likewise, in dB.
        word_error_rate: of the made waves, all words of all utterances counted alike; None without a recogniser. To be
            compared with that of the natural ones.
    """

    utterances: int
    seconds: float
    mel_l1: float
    mel_l1_error: float
    log_spectral_distance: float
    log_spectral_distance_error: float
    mel_cepstral_distortion: float
    mel_cepstral_distortion_error: float
    word_error_rate: float | None = None
    word_error_rate_error: float | None = None


class Recogniser:
    """The words that pocketsphinx hears: its English model, a general dictionary and a trigram language model.

    What it hears is a function of the wave alone; nothing of the utterances before is kept. It works at 16 kHz: speech
    that had been cut to 4 kHz, it misheard twice as often.

    Args:
        choices: the only utterances that there are, such as the ten digits; empty: any words. Of a single short word a
            language model of sentences has little to say.

    Attributes:
        rate: the samples a second that it expects.

    Raises:
        ValueError: a choice is empty, or has a word that the dictionary does not know.
        ImportError: pocketsphinx is not installed.
    """

    rate = 16000

    def __init__(self, choices: Sequence[str] = ()):
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise ImportError("a recogniser needs the library pocketsphinx: pip install 'kuosan[speech]'") from None
        self._decoder: Any = Decoder(loglevel="FATAL", dither=True, seed=1)  # in digital silence it would hear words
        if choices:
            for word in (word for choice in choices for word in choice.split() or [""]):
                if not word or self._decoder.lookup_word(word) is None:
                    raise ValueError(f"the recogniser does not know the word {word!r}")
            grammar = f"#JSGF V1.0; grammar choices; public <one> = {' | '.join(choices)};"
            self._decoder.add_jsgf_string("choices", grammar)
            self._decoder.activate_search("choices")

    def __call__(self, wave: Tensor) -> str:
        """The words in lower case with spaces between, "" where there are none.

        Args:
            wave: (N,) at 16 kHz; what is beyond [-1, 1] is clipped, as in a sound file.

        Raises:
            ValueError: the wave is not (N,), empty or not finite.
        """
        _expect(wave, "the wave")
        levels = (wave.detach().double().cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
        decoder = self._decoder
        decoder.reinit_feat()  # forgets the utterances before, and begins the dither anew
        decoder.start_utt()
        decoder.process_raw(levels.numpy().tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found else ""


def mel_l1(natural: Tensor, made: Tensor, analysis: Analysis) -> Tensor:
    r"""How far two waves' mels are apart: the mean over mels and frames of the absolute difference, (B,).

    .. math:: \frac{1}{M T} \sum_{mt} |m_{mt} - \hat m_{mt}|

    with m of `Analysis.mel`, in nats: 0.1 is about a tenth of the magnitude. The loss of many vocoders (HiFi-GAN,
    Kong et al. 2020).

    Args:
        natural: waves (B, N).
        made: as many, aligned with them.

    Raises:
        ValueError: the waves have different shapes, or are not (B, N) of real numbers, or empty.
        ImportError: librosa is not installed.
    """
    return _mel_difference(natural, made, analysis).abs().mean((1, 2))


def mel_cepstral_distortion(natural: Tensor, made: Tensor, analysis: Analysis, cepstra: int = CEPSTRA) -> Tensor:
    r"""How far two waves' mel cepstra are apart in dB (Kubichek 1993), the mean over frames, (B,).

    .. math::
        \frac{10}{\ln 10} \, \frac{1}{T} \sum_t \sqrt{2 \sum_{d=1}^{D} (c_{dt} - \hat c_{dt})^2},
        \qquad c_{dt} = \sqrt{\tfrac{2}{M}} \sum_{m=0}^{M-1} m_{mt} \cos \frac{\pi d (m + 1/2)}{M}

    The cepstra are the orthonormal cosine transform (DCT-II) of the log-mel, as MFCCs are; the loudness, c_0, is left
    out. The waves are aligned, so that there is no time warping. The measure grows with the square root of the number
    of mels: its values are comparable at equal constants only, and not with those of SPTK's or WORLD's mel cepstra.

    Args:
        natural: waves (B, N).
        made: as many, aligned with them.
        cepstra: how many there are, D.

    Raises:
        ValueError: as `mel_l1`, or there are not so many cepstra of so many mels.
        ImportError: librosa is not installed.
    """
    if not 1 <= cepstra < analysis.mels:
        raise ValueError(f"cepstra must lie in 1 .. {analysis.mels - 1}, as there are {analysis.mels} mels: {cepstra}")
    difference = _mel_difference(natural, made, analysis)
    d = torch.arange(1, cepstra + 1, dtype=torch.float64)[:, None]
    m = torch.arange(analysis.mels, dtype=torch.float64)
    cosines = math.sqrt(2 / analysis.mels) * torch.cos(math.pi / analysis.mels * d * (m + 0.5))  # (D, M)
    c = cosines.to(difference) @ difference
    return 10 / math.log(10) * (2 * c.square().sum(1)).sqrt().mean(1)


def log_spectral_distance(natural: Tensor, made: Tensor, analysis: Analysis) -> Tensor:
    r"""How far two waves' spectra are apart in dB (Gray and Markel 1976, of spectra instead of models), (B,).

    .. math::
        \frac{1}{T} \sum_t \sqrt{\frac{1}{F} \sum_f \Bigl( 20 \log_{10}
        \frac{\max(\text{floor}, |X_{ft}|)}{\max(\text{floor}, |\hat X_{ft}|)} \Bigr)^2}

    All frequencies count alike, so that it is high wherever there is noise: two draws of one noise are 7.9 dB apart.
    Griffin-Lim descends on the spectrum of its own analysis; give another here (n_fft 2048, hop 512) to see how much of
    its advantage is left in frames that it does not know.

    Args:
        natural: waves (B, N).
        made: as many, aligned with them.

    Raises:
        ValueError: as `mel_l1`.
    """
    _same(natural, made)
    x, y = (analysis.stft(wave).abs().clamp(min=analysis.floor).log10() for wave in (natural, made))
    return (20 * (x - y)).square().mean(1).sqrt().mean(1)


def word_error_rate(texts: Sequence[str], heard: Sequence[str]) -> tuple[float, float]:
    r"""The word error rate of all utterances together, and its standard error over utterances.

    .. math:: r = \frac{\sum_i e_i}{\sum_i n_i}, \qquad
        \operatorname{se}^2 = \frac{N}{N - 1} \frac{\sum_i (e_i - r n_i)^2}{(\sum_i n_i)^2}

    where e_i is the fewest substitutions, deletions and insertions (by jiwer) that lead from the n_i words of text i to
    the words heard; insertions can bring the rate above 1. The error is that of a ratio, linearised (Cochran 1977,
    section 2.11, without finite population): utterances are the independent units, words of one are not.

    Args:
        texts: what was to be said; both sides are :func:`.words.normalised`.
        heard: as many.

    Returns:
        r and se; se is NaN of a single utterance.

    Raises:
        ValueError: there are not as many texts as utterances, or no words in the texts.
        ImportError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise ImportError("word error rates need the library jiwer: pip install 'kuosan[speech]'") from None
    if len(texts) != len(heard):
        raise ValueError(f"{len(texts)} texts do not fit {len(heard)} utterances")
    errors, words = [], []
    for text, said in zip(map(normalised, texts), map(normalised, heard), strict=True):
        aligned = jiwer.process_words(text, said)
        errors.append(aligned.substitutions + aligned.deletions + aligned.insertions)
        words.append(len(text.split()))
    if not sum(words):
        raise ValueError("the texts have no words, so there is no error rate")
    rate = sum(errors) / sum(words)
    if len(words) < 2:
        return rate, math.nan
    squares = math.fsum((e - rate * n) ** 2 for e, n in zip(errors, words, strict=True))
    return rate, math.sqrt(len(words) / (len(words) - 1) * squares) / sum(words)


def real_time_factor(make: Callable[[], Tensor], rate: int, repeats: int = 3) -> float:
    """Seconds of clock that it takes to make a second of sound; below 1 is faster than speech.

    Args:
        make: makes waves (..., N), of which every row counts; called once before the clock starts.
        rate: their samples a second.
        repeats: how many calls there are on the clock; the median counts.

    Raises:
        ValueError: nothing was made, or the rate or the repeats are less than 1.
    """
    if rate < 1 or repeats < 1:
        raise ValueError(f"rate and repeats must be at least 1, got {rate} and {repeats}")
    samples = make().numel()
    if not samples:
        raise ValueError("nothing was made: the wave has no samples")
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        make().cpu()  # an accelerator's clock stops when the wave is here
        taken.append(time.perf_counter() - start)
    return median(taken) * rate / samples


def judge(
    natural: Sequence[Tensor],
    made: Sequence[Tensor],
    texts: Sequence[str] | None,
    analysis: Analysis,
    recogniser: Callable[[Tensor], str] | None = None,
) -> Quality:
    """Compare made waves with the natural ones of the same utterances; each pair is cut to the shorter one.

    Args:
        natural: waves (N,), at the analysis' rate.
        made: as many, aligned with them and at most n_fft samples longer or shorter.
        texts: what is said in each, empty where that is not known; only a recogniser needs it.
        recogniser: gives the words of a wave, as `Recogniser` does; None leaves the word error rates out.

    Raises:
        ValueError: there are no waves, or not as many of each; a wave is not (N,), empty or not finite; a pair's
            lengths are too far apart; the recogniser has no texts, or expects another rate.
        ImportError: librosa is not installed, or jiwer where there is a recogniser.
    """
    if not len(natural):
        raise ValueError("there are no waves to judge")
    if len(made) != len(natural):
        raise ValueError(f"{len(natural)} natural waves do not fit {len(made)} made ones")
    if recogniser is not None:
        if texts is None or len(texts) != len(natural):
            raise ValueError(f"a recogniser needs a text for each of the {len(natural)} waves")
        expected = getattr(recogniser, "rate", analysis.rate)
        if expected != analysis.rate:
            raise ValueError(f"the recogniser expects {expected} samples a second, the waves have {analysis.rate}")
    pairs = [_aligned(x, y, k, analysis) for k, (x, y) in enumerate(zip(natural, made, strict=True))]
    found: dict[str, Any] = {}
    for measure in (mel_l1, log_spectral_distance, mel_cepstral_distortion):
        values = [float(measure(x[None], y[None], analysis)) for x, y in pairs]
        found[measure.__name__] = fmean(values)
        found[f"{measure.__name__}_error"] = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    if recogniser is not None and texts is not None:
        spoken = [k for k, text in enumerate(texts) if normalised(text)]  # of the others nothing is known
        rates = word_error_rate([texts[k] for k in spoken], [recogniser(pairs[k][1]) for k in spoken])
        found["word_error_rate"], found["word_error_rate_error"] = rates
    return Quality(len(pairs), sum(len(x) for x, _ in pairs) / analysis.rate, **found)


def _mel_difference(natural: Tensor, made: Tensor, analysis: Analysis) -> Tensor:
    _same(natural, made)
    return analysis.mel(natural) - analysis.mel(made)


def _same(natural: Tensor, made: Tensor) -> None:
    if natural.shape != made.shape:
        raise ValueError(f"waves {tuple(natural.shape)} and {tuple(made.shape)} are not aligned: cut both alike")


def _expect(wave: Tensor, what: str) -> None:
    if wave.ndim != 1 or not wave.is_floating_point():
        raise ValueError(f"{what} should be (N,) of real numbers, got {tuple(wave.shape)} of {wave.dtype}")
    if not len(wave):
        raise ValueError(f"{what} is empty")
    if not bool(wave.isfinite().all()):
        raise ValueError(f"{what} has samples that are not finite")


def _aligned(natural: Tensor, made: Tensor, k: int, analysis: Analysis) -> tuple[Tensor, Tensor]:
    """Both waves, detached, in float64 on the CPU, cut to the shorter one."""
    _expect(natural, f"natural wave {k}")
    _expect(made, f"made wave {k}")
    if abs(len(natural) - len(made)) > analysis.n_fft:
        raise ValueError(
            f"natural wave {k} has {len(natural)} samples and the made one {len(made)}: "
            f"more than n_fft = {analysis.n_fft} apart, so they can hardly be aligned"
        )
    n = min(len(natural), len(made))
    return natural[:n].detach().double().cpu(), made[:n].detach().double().cpu()

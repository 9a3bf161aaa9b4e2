"""Speech as a medium: windows of recordings as states with their mels, WAV files, and the measures of made waves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuosan.fetch import to_stderr
from kuosan.medium import Medium, Unit
from kuosan.recipe import Data, RecipeError, Speech
from kuosan.speech import data as speech_data
from kuosan.speech.analysis import Analysis
from kuosan.speech.audio import SILENT, read_audio, resampled, write_wav
from kuosan.speech.data import Clips, SpeechData
from kuosan.speech.judge import Recogniser, judge
from kuosan.speech.pictures import save_page
from kuosan.speech.states import STATES, State, told

#: Windows begin at every one of so many parts of a hop.
OFFSETS = 4
#: Of :class:`~.judge.Quality`: in words, and how many digits.
MEASURES = {
    "mel_l1": ("mel-L1, nats", ".3f"),
    "log_spectral_distance": ("log-spectral distance, dB", ".2f"),
    "mel_cepstral_distortion": ("mel-cepstral distortion, dB", ".2f"),
    "word_error_rate": ("word error rate", ".3f"),
}
#: Of the waves that are compared.
NAMES = {"samples": "ours", "griffin_lim": "Griffin-Lim, 32", "natural": "natural"}


def analysis_of(section: Speech) -> Analysis:
    """The constants of the mel that a recipe has.

    Raises:
        RecipeError: they do not go together.
    """
    try:
        return Analysis(
            section.rate, section.n_fft, section.hop, section.mels, section.low, section.high, section.floor
        )
    except ValueError as error:
        raise RecipeError(f"data.speech: {error}") from None


class SpeechMedium(Medium):
    """Recordings of speech. An example is a window of them, laid end to end: a state, told its mel."""

    one, many, suffix = "window", "windows", ".wav"
    unit = Unit("bits per dimension", "bits_per_dim", each_dimension=True)

    @staticmethod
    def read(section: Data) -> SpeechData:
        assert section.speech is not None
        analysis_of(section.speech)  # says what is wrong with them
        section.refuse("size", "channels", why="of images, and this is speech")
        section.refuse("length", "tokens", "vocabulary", "text", "label", why="of texts, and this is speech")
        if section.name is not None:
            section.refuse("held_out", why="of a folder of your own: this data has its own")
            if section.speech.trim:
                raise RecipeError("data.speech.trim: is of a folder of your own: drop it")
            data = speech_data.NAMED[section.name]()
            if data.rate != section.speech.rate:
                raise RecipeError(f"data.speech.rate: {data.name} has {data.rate} samples a second")
        else:
            folder = Path(section.folder or "").expanduser()
            how: dict[str, Any] = {"held_out": section.held_out, "trim": section.speech.trim}
            data = speech_data.load(folder, rate=section.speech.rate, **how)
        if section.speech.state in STATES:
            longest = min(sum(map(len, part.waves)) for part in (data.train, data.held_out))
            needed = state_of(section.speech).window(section.speech.frames)
            if longest < needed:
                raise RecipeError(
                    f"data.speech.frames: a window of {section.speech.frames} frames takes {needed / data.rate:.2f} s, "
                    f"and there are {longest / data.rate:.2f} s to take it from"
                )
        return data

    @staticmethod
    def describe(section: Data, data: SpeechData) -> dict[str, Any]:
        assert section.speech is not None
        parts = [repr(data.rate).encode()]
        parts += [wave.numpy().tobytes() for part in (data.train, data.held_out) for wave in part.waves]
        shape = state_of(section.speech).shape(section.speech.frames) if section.speech.state in STATES else ()
        return {"shape": list(shape), "levels": 0, "parts": parts}

    @cached_property
    def state(self) -> State:
        """What is diffused."""
        assert self.section.speech is not None
        return state_of(self.section.speech)

    @cached_property
    def analysis(self) -> Analysis:
        """The constants of the mel."""
        assert self.section.speech is not None
        return analysis_of(self.section.speech)

    # -- what a model sees --------------------------------------------------------------------------------------------

    @property
    def _window(self) -> tuple[int, int]:
        """Samples of a window, and from one to the next."""
        assert self.section.speech is not None
        return self.state.window(self.section.speech.frames), max(1, self.analysis.hop // OFFSETS)

    def size(self, part: Clips) -> int:
        length, step = self._window
        return (int(part.lengths.sum()) - length) // step + 1

    def batch(self, part: Clips, index: Tensor) -> tuple[Tensor, Tensor]:
        length, step = self._window
        x_0, mel = self.state.cut(torch.stack([part.joined[i * step : i * step + length] for i in index.tolist()]))
        return x_0, told(mel)

    def untold(self, condition: Tensor, keep: Tensor) -> Tensor:
        return condition  # a mel or a text is told always

    def read_files(self, files: Sequence[str | Path]) -> tuple[list[str], Any]:
        """Names and waves, at the rate of the model, of sound files.

        Raises:
            FileNotFoundError, ValueError: as :func:`~.audio.read_audio`; or one is silent.
        """
        waves = []
        for file in files:
            wave, sound = read_audio(file)
            if sound.silent:
                raise ValueError(f"{file} is silent: it never comes above {SILENT:g} of full scale")
            if sound.rate != self.analysis.rate:
                to_stderr(f"{file}: resampled from {sound.rate:,} to {self.analysis.rate:,} samples a second")
            waves.append(resampled(wave, sound.rate, self.analysis.rate))
        return [Path(file).stem for file in files], waves

    # -- samples ------------------------------------------------------------------------------------------------------

    def outputs(self, x: Tensor) -> Tensor:
        return x

    def save(self, sample: Tensor, path: Path, notes: Mapping[str, Any]) -> None:
        """A wave (N,) as 16-bit WAV, and what the terminal has to know of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if clipped := write_wav(path, sample, self.analysis.rate):
            to_stderr(f"{path}: {clipped:,} of {len(sample):,} samples are beyond full scale, and cut off there")

    def sheet(
        self, samples: Sequence[Path | Tensor] | Tensor, path: Path, columns: int | None, notes: Mapping[str, Any]
    ) -> Path:
        """Spectrograms of waves, one under the other."""
        waves = [read_audio(one)[0] if isinstance(one, Path) else one for one in samples]
        return save_page([[wave] for wave in waves], self.analysis, path.with_suffix(".png"), notes)

    # -- judging ------------------------------------------------------------------------------------------------------

    def trained_judge(self) -> Recogniser:
        """Of words. Distances from natural waves need none."""
        if self.analysis.rate != Recogniser.rate:
            raise ValueError(f"the recogniser of words expects {Recogniser.rate:,} samples a second")
        if self.data.held_out.texts is None:
            raise ValueError("nobody knows what is said in the recordings, so nothing can tell whether it is heard")
        return Recogniser()

    def griffin_lim(self, wave: Tensor, iterations: int = 32) -> Tensor:
        """What Griffin-Lim makes of a wave's mel: the pseudo-inverse's magnitudes, and phases found for them."""
        mel = self.analysis.mel(wave[None])
        return self.analysis.griffin_lim(self.analysis.magnitude(mel), iterations, n=len(wave))[0]

    def quality(self, samples: Any, labels: Tensor | None) -> dict[str, Any]:
        """Made waves beside what Griffin-Lim makes of the same mels, and the natural ones themselves.

        Args:
            samples: a wave for each of some held-out clips.
            labels: which ones, (N,); the first ones without it.
        """
        part = self.data.held_out
        chosen = range(len(samples)) if labels is None else labels.tolist()
        natural = [part.waves[i] for i in chosen]
        texts = None if part.texts is None or self.judge is None else [part.texts[i] for i in chosen]
        if texts is not None and not any(texts):
            texts = None
        rows = {"natural": natural, "griffin_lim": [self.griffin_lim(wave) for wave in natural], "samples": samples}
        recogniser = None if texts is None else self.judge
        return {name: asdict(judge(natural, made, texts, self.analysis, recogniser)) for name, made in rows.items()}

    def quality_in_words(self, quality: Mapping[str, Any]) -> list[str]:
        columns = ("samples", "griffin_lim", "natural")
        lines = [f"{'quality, ± over utterances':34s}" + "".join(f"{NAMES[name]:>18s}" for name in columns)]
        for measure, (what, form) in MEASURES.items():
            found = [(quality[name][measure], quality[name][f"{measure}_error"]) for name in columns]
            if found[0][0] is not None:
                lines.append(f"  {what:32s}" + "".join(f"{with_error(*one, form):>18s}" for one in found))
        lines += speed_in_words(quality)
        lines.append(f"  ({quality['samples']['utterances']} utterances, {quality['samples']['seconds']:.0f} s)")
        return lines


def state_of(section: Speech) -> State:
    """What a recipe diffuses.

    Raises:
        RecipeError: the constants of its mel do not go together.
    """
    return STATES[section.state](analysis_of(section))


def with_error(value: float, error: float | None, form: str) -> str:
    """A number and its standard error, if that is known."""
    known = error is not None and not math.isnan(error)
    return f"{value:{form}} ± {error:{form}}" if known else f"{value:{form}}"


def speed_in_words(quality: Mapping[str, Any]) -> list[str]:
    what = f"{quality['evaluations']} evaluations, {quality['threads']} thread" + "s" * (quality["threads"] > 1)
    return [f"  {'seconds for a second of speech':32s}{quality['real_time_factor']:>18.3f}  ({what})"]

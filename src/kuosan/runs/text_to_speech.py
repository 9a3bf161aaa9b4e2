"""The run of a model of text to speech: samples are waves of texts, by way of a mel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kuosan.progress import Progress
from kuosan.runs.diffusion import OF_TEXT_TO_SPEECH, OF_VOCODERS
from kuosan.runs.run import RunError, device
from kuosan.runs.speech import FOREIGN, MEASURED_ON, Speaker, SpeechRun
from kuosan.runs.vocoder import VocoderRun
from kuosan.seeds import stream
from kuosan.speech.acoustic import Acoustic
from kuosan.speech.alignment import expand
from kuosan.speech.mel import Mel
from kuosan.speech.phonemes import encode
from kuosan.speech.states import Magnitude, untold
from kuosan.speech.transcribed import TranscribedMedium

#: Times as fast as the voice speaks by itself, and seconds.
SPEEDS, MOST_SECONDS = (0.1, 10.0), 600.0


@dataclass(frozen=True)
class Reader(Speaker):
    """A sampler of texts read out.

    Args:
        acoustic: the model, which reads texts.
        vocoder: what makes waves of mels, and its sampler; None: Griffin-Lim.
        speed: 2 is twice as fast as the voice speaks by itself.
        seconds: how long a text is to last; None: by the text.
    """

    acoustic: Acoustic | None = None
    vocoder: tuple[VocoderRun, Speaker] | None = None
    speed: float = 1.0
    seconds: float | None = None


class TextToSpeechRun(SpeechRun):
    """A trained (or half-trained) model of text to speech."""

    families = ("tts",)
    foreign = (*FOREIGN, *OF_VOCODERS, "weak")
    medium: TranscribedMedium

    @property
    def denoiser(self) -> Acoustic:
        """The model with its averaged weights, ready to use."""
        return self.model

    def aligned(self, part: Any, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some recordings: mels (B, M, T) as the network sees them, symbols (B, L), and durations (B, L)."""
        x_0, ids = (one.to(device()) for one in self.medium.batch(part, index))
        with torch.no_grad():
            return x_0, ids, self.denoiser.align(self.denoiser.encoder(ids)[0], x_0, ids)

    def states(self, part: Any) -> tuple[Tensor, Tensor | None]:
        """Windows of a part's recordings, the first of each, and the means that the network is told of them."""
        index = torch.arange(self.medium.size(part))[:MEASURED_ON]
        frames = torch.arange(self.shape[1])
        windows = []
        for chosen in self.medium.arranged(part, index).split(16):
            x_0, ids, lasts = self.aligned(part, chosen)
            with torch.no_grad():
                mu = expand(self.denoiser.encoder(ids)[0], lasts)
            for x, m, n in zip(x_0, mu, lasts.sum(1).tolist(), strict=True):
                windows.append((x[:, frames % n], m[:, frames % n]))
        return torch.stack([x for x, _ in windows]), torch.stack([m for _, m in windows])

    def conditions(self, n: int) -> Tensor:
        """The means of n training windows, in turn."""
        told_of = self.states(self.data.train)[1]
        assert told_of is not None
        return told_of[torch.arange(n) % len(told_of)]

    def sampler(self, **settings: Any) -> Reader:
        """As of any diffusion run.

        Args:
            settings: beside those: text, what is to be said, or a list; vocoder, the run of one or its folder, instead
                of Griffin-Lim; speed, 2 is twice as fast; seconds, how long a text is to last; temperature, of the
                noise at the start.

        Raises:
            ValueError: a text that cannot be read, a vocoder of mels with other constants, an impossible speed.
        """
        text, vocoder, speed, seconds = (settings.pop(name, None) for name in OF_TEXT_TO_SPEECH)
        found = super().sampler(**settings)
        if speed is not None and seconds is not None:
            raise RunError("a length in seconds leaves no speed to choose: drop one of them")
        if speed is not None and not SPEEDS[0] <= speed <= SPEEDS[1]:
            raise RunError(f"speed must lie in {SPEEDS[0]:g} to {SPEEDS[1]:g}, got {speed:g}")
        if seconds is not None and not 0 < seconds <= MOST_SECONDS:
            raise RunError(f"seconds must be more than 0 and at most {MOST_SECONDS:g}, got {seconds:g}")
        items = None if text is None else [(one, one) for one in ([text] if isinstance(text, str) else text)]
        if items is not None and not items:
            raise ValueError("nothing to say: give at least one text")
        for _, one in items or ():
            encode(one)  # says now what cannot be read
        vocoder = self.recipe.sampling.vocoder if vocoder is None else vocoder
        told_of = {"text": text, "speed": speed, "seconds": seconds}
        found.how.update({name: value for name, value in told_of.items() if value is not None})
        found.how["vocoder"] = "Griffin-Lim"
        if vocoder is not None:
            run = vocoder if isinstance(vocoder, VocoderRun) else VocoderRun.open(vocoder)
            try:
                run.medium.analysis.check(self.medium.analysis)
            except ValueError as error:
                raise RunError(f"{run.folder} cannot be the vocoder of {self.folder}: {error}") from None
            phases = settings.get("griffin_lim") if isinstance(run.medium.state, Magnitude) else None
            vocoder = run, run.sampler(griffin_lim=phases)
            found.how["griffin_lim"] = vocoder[1].griffin_lim
            found.how["vocoder"] = str(run.folder)
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(Speaker)} | {"items": items}
        own: dict[str, Any] = {"speed": 1.0 if speed is None else speed, "seconds": seconds}
        return Reader(**parts, acoustic=self.denoiser, vocoder=vocoder, **own)

    def items(self, sampler: Speaker, n: int) -> list[tuple[str, Any]]:
        """As of other runs; one text alone is said n times."""
        if sampler.items is not None and len(sampler.items) == 1:
            return list(sampler.items) * n
        return super().items(sampler, n)

    def held_out(self) -> list[tuple[str, Any]]:
        part = self.data.held_out
        return list(zip(part.names, part.transcripts, strict=True))

    def while_training(self, model: Any) -> Reader:
        found = super().while_training(model)
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(Speaker)}
        return Reader(**parts, acoustic=model)

    def mel(self, sampler: Reader, text: str, seed: int) -> Mel:
        """The mel of a text read out."""
        analysis, model = self.medium.analysis, sampler.acoustic
        assert model is not None
        frames = None if sampler.seconds is None else analysis.frames(max(1, round(sampler.seconds * analysis.rate)))
        with torch.no_grad():
            mu, _ = model.told(torch.tensor([encode(text)], device=device()), sampler.speed, frames)
        x = self.drawn(sampler, mu, tuple(mu.shape[1:]), seed)
        values = untold(x[0]).clamp_min(torch.tensor(analysis.floor).log())
        return Mel(values, analysis, (values.shape[1] - 1) * analysis.hop, text)

    def wave(self, sampler: Reader, item: str, seed: int) -> Tensor:
        """The wave (N,) of a text."""
        return self.sound(sampler, self.mel(sampler, item, seed), seed)

    def sound(self, sampler: Reader, mel: Mel, seed: int) -> Tensor:
        """The wave (N,) of a mel, by the vocoder or by Griffin-Lim."""
        if sampler.vocoder is not None:
            run, speaker = sampler.vocoder
            return run.wave(speaker, mel, stream("vocoder", seed).initial_seed())  # not the noise of the mel again
        return mel.griffin_lim(sampler.griffin_lim)

    def chain(self, **settings: Any) -> Any:
        """There is none of a text alone: what the denoiser is told depends on the alignment with the mel itself."""
        raise RunError(f"{self.folder} has no bound on its mels given their texts: it aligns the two first")

    def quality(self, n: int, **settings: Any) -> Mapping[str, Any]:
        """Of n held-out texts at most: how their words are heard, beside natural speech and its mel made sound again.

        Raises:
            ValueError: there is no recogniser of words.
        """
        if self.judge is None:
            raise RunError(f"text to speech is judged by its words: {self.why_no_judge}")
        items, part = self.held_out()[:n], self.data.held_out
        sampler = self.sampler(**settings)
        waves = self.sample(len(items), progress=Progress("samples"), **settings)
        natural = part.waves[: len(items)]
        again = [self.sound(sampler, Mel.of(wave, self.medium.analysis), i) for i, wave in enumerate(natural)]
        rows = {"natural": natural, "analysed": again, "samples": waves}
        return self.medium.heard(rows, part.texts or []) | self.timed(sampler, items, waves)

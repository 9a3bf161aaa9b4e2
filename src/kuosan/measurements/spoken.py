"""What a report measures of text to speech: sound beside sound, words heard, when each is said, evaluations."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor

from kuosan import figures
from kuosan.figures import WIDE, Panel
from kuosan.measurements.speech import SpeechMeasurements
from kuosan.progress import Progress
from kuosan.runs import TextToSpeechRun
from kuosan.runs.text_to_speech import Reader
from kuosan.speech.mel import Mel
from kuosan.speech.phonemes import PAUSES, SYMBOLS, encode
from kuosan.speech.pictures import spectrograms
from kuosan.speech.transcribed import TranscribedMedium

#: Compared with the last one.
EVALUATIONS, MANY = (1, 2, 4, 8, 16), 50
#: Texts that are enough to compare mels.
ENOUGH = 20
#: Recordings whose alignment is drawn, preferably of about so many symbols, and those that durations are compared of.
DRAWN, READABLE, COMPARED = 2, 30, 200
#: Pauses in words, as their marks are hardly seen.
PAUSES_IN_WORDS = dict(zip(PAUSES, ("gap", "rest", "stop"), strict=True))
APART = Panel("difference", "mean absolute difference of the mel, nats", "difference_error")


class TextToSpeechMeasurements(SpeechMeasurements):
    """The measurements of a report of text to speech."""

    run: TextToSpeechRun
    medium: TranscribedMedium
    page = "spoken.html"
    kind = "A model of text to speech"
    sections = ("facts", "samples", "alignment", "loss", "evaluations")
    shares: ClassVar[Mapping[str, float]] = {"samples": 0.3, "quality": 0.4, "evaluations": 0.3}
    columns: ClassVar[Mapping[str, str]] = {
        "natural": "natural",
        "analysed": "natural mel made sound again",
        "samples": "ours",
    }

    @property
    def model_in_words(self) -> dict[str, str]:
        recipe = self.run.recipe
        assert recipe.network is not None
        assert recipe.process is not None
        return {
            "reads": "phonemes",
            "diffuses": "the mel, told the mean mel of each phoneme",
            "network": recipe.network["kind"],
            "predicts": recipe.denoiser.predicts,
            "noise schedule": recipe.process["kind"],
        }

    def facts(self) -> tuple[dict[str, Any], None]:
        texts = [encode(text) for text in self.run.data.train.transcripts or ()]
        found = {symbol for text in texts for symbol in text}
        symbols = {"said": sum(map(len, texts)), "distinct": len(found), "known": len(SYMBOLS) - 1}  # beside padding
        return super().facts()[0] | {"symbols": symbols, "vocoder": self._sampler.how["vocoder"]}, None

    def one_evaluation(self, samples: int) -> None:
        place = next(self.run.denoiser.parameters()).device
        x = torch.zeros(samples, *self.run.shape, device=place)
        with torch.no_grad():
            self.run.denoiser(x, torch.full((samples,), 0.5, device=place), x)

    # -- sounds -------------------------------------------------------------------------------------------------------

    @cached_property
    def _sampler(self) -> Reader:
        return self.run.sampler()

    def _reader(self, **settings: Any) -> Reader:
        """A sampler with other settings and the same vocoder, which is not opened anew."""
        vocoder = self._sampler.vocoder
        return self.run.sampler(**settings, vocoder=None if vocoder is None else vocoder[0])

    def _mel(self, sampler: Reader, i: int, seed: int) -> Mel:
        return self.run.mel(sampler, (self.clips.transcripts or [])[i], seed)

    def make(self, name: str, i: int) -> Tensor:
        mel = self._mel(self._sampler, i, i) if name == "samples" else Mel.of(self.clips.waves[i], self.analysis)
        return self.run.sound(self._sampler, mel, i)

    def once(self, i: int) -> None:
        self.run.sound(self._sampler, Mel.of(self.clips.waves[i], self.analysis), i)

    def compared(self, chosen: Sequence[int], rows: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        if self.run.judge is not None:
            return self.medium.heard(rows, list(map(self._says, chosen)))
        unheard = {"word_error_rate": None, "word_error_rate_error": None, "utterances": len(chosen)}
        return {name: unheard | {"seconds": sum(map(len, x)) / self.analysis.rate} for name, x in rows.items()}

    # -- when each symbol is said -------------------------------------------------------------------------------------

    def _lasts(self, i: int) -> tuple[Tensor, Tensor]:
        """How many frames each symbol of a recording lasts (L,): by the alignment found, and by the encoder."""
        _, ids, found = self.run.aligned(self.clips, torch.tensor([i]))
        with torch.no_grad():
            _, predicted = self.run.denoiser.told(ids)
        return found[0].cpu(), predicted[0].cpu()

    def alignment(self) -> tuple[dict[str, Any], list[str]]:
        readable = sorted(self._shown, key=lambda i: abs(len(encode((self.clips.transcripts or [])[i])) - READABLE))
        drawn, plots = [], []
        for k, i in enumerate(sorted(readable[:DRAWN]), 1):
            ids = encode((self.clips.transcripts or [])[i])
            found, predicted = (lasts.tolist() for lasts in self._lasts(i))
            (picture,) = spectrograms([self.clips.waves[i]], self.analysis)
            names = [PAUSES_IN_WORDS.get(SYMBOLS[n], SYMBOLS[n]) for n in ids]
            pauses = [k for k, name in enumerate(names) if name in PAUSES_IN_WORDS.values()]
            paths = {"found": found, "predicted from the text": predicted}
            plots.append(figures.alignment(picture.convert("RGB"), names, paths, pauses, f"alignment of text {k}"))
            text = (self.clips.transcripts or [])[i]
            drawn.append({"name": self.clips.names[i], "seed": i, "text": text, "symbols": names})
            drawn[-1] |= {"found": found, "predicted": predicted}
            drawn[-1] |= {"frames": self.analysis.frames(len(self.clips.waves[i])), "frames_predicted": sum(predicted)}
        return {"drawn": drawn} | self._durations(), plots

    def _durations(self) -> dict[str, Any]:
        """How far the durations that the encoder predicts are from those that are found."""
        chosen = self._order[:COMPARED]
        pairs = [self._lasts(i) for i in chosen]
        found, predicted = (torch.cat(lasts).double() for lasts in zip(*pairs, strict=True))
        each = 1000 * self.analysis.hop / self.analysis.rate
        return {
            "recordings": len(chosen),
            "symbols": len(found),
            "milliseconds": float(found.mean()) * each,
            "difference": float((found - predicted).abs().mean()) * each,
            "ratio": float(predicted.sum() / found.sum()),
        }

    # -- sweep --------------------------------------------------------------------------------------------------------

    def evaluations(self) -> tuple[dict[str, Any], str]:
        """How far mels are from those of many evaluations, with the same noise; and those of other noise."""
        solver, (*settings, (most, many)) = self.tries((*EVALUATIONS, MANY))
        each = sum(self.takes(count) for count in (*(count for count, _ in settings), most, most))
        chosen = self.affordable("evaluations", self._order, each)[:ENOUGH]
        progress = Progress("evaluations")
        begun = time.monotonic()
        best = [self._mel(self._reader(**many), i, i).values for i in chosen]
        seconds = sum(x.shape[1] for x in best) * self.analysis.hop / self.analysis.rate
        took = (time.monotonic() - begun) / seconds
        others = [self._mel(self._reader(**many), i, len(self.clips) + i).values for i in chosen]
        progress(1, len(settings) + 1)
        points = []
        for done, (count, how) in enumerate(settings, 2):
            sampler, begun = self._reader(**how), time.monotonic()
            mels = [self._mel(sampler, i, i).values for i in chosen]
            points.append({"evaluations": count, "real_time_factor": (time.monotonic() - begun) / seconds})
            points[-1] |= _apart(mels, best)
            progress(done, len(settings) + 1)
        found = {"recordings": len(chosen), "seconds": seconds, "solver": solver, "points": points, "most": most}
        found |= {
            "temperature": self._sampler.temperature,
            "real_time_factor": took,
            "other_noise": _apart(others, best),
        }
        counts, other = [point["evaluations"] for point in points], found["other_noise"]["difference"]
        plot = figures.sweep_plot(
            APART, "evaluations", counts, points, other, True, ("ours", "another noise"), size=WIDE
        )
        return found, plot


def _apart(mels: Sequence[Tensor], others: Sequence[Tensor]) -> dict[str, float | None]:
    """The mean over texts of the mean absolute difference, and its standard error."""
    found = [float((x - y).abs().mean()) for x, y in zip(mels, others, strict=True)]
    error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else None
    return {"difference": fmean(found), "difference_error": error}

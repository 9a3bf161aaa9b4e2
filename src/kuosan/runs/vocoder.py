"""The run of a vocoder: samples are waves of the mels that it is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuosan.plain import plain
from kuosan.progress import Progress
from kuosan.runs.diffusion import OF_TEXT_TO_SPEECH
from kuosan.runs.run import RunError, write
from kuosan.runs.speech import FOREIGN, MEASURED_ON, Speaker, SpeechRun
from kuosan.sampler import Settings
from kuosan.seeds import stream
from kuosan.speech.judge import judge
from kuosan.speech.medium import NAMES
from kuosan.speech.mel import Mel
from kuosan.speech.pictures import MOST, save_page
from kuosan.speech.states import Magnitude, told

#: Where a vocoder keeps how good it was while training.
FOLLOWED = "quality.jsonl"
#: What a vocoder takes one of.
GIVEN = (str, Path, Tensor, Mel)


class VocoderRun(SpeechRun):
    """A trained (or half-trained) vocoder: a diffusion model that is told a mel."""

    families = ("vocoder",)
    foreign = (*FOREIGN, *OF_TEXT_TO_SPEECH)

    def states(self, part: Any) -> tuple[Tensor, Tensor | None]:
        """Some windows of a part: all of them would not fit into memory."""
        chosen = torch.randperm(self.medium.size(part), generator=stream("states"))[:MEASURED_ON]
        return self.medium.batch(part, chosen)

    def conditions(self, n: int) -> Tensor:
        """The mels of n training windows, as the network is told them, spread over the recordings."""
        part = self.data.train
        return self.medium.batch(part, torch.linspace(0, self.medium.size(part) - 1, n, dtype=torch.float64).long())[1]

    def sampler(self, **settings: Any) -> Speaker:
        """As of any diffusion run.

        Args:
            settings: beside those: input, sound files to be analysed and made anew, waves (N,) at the model's rate, or
                :class:`~kuosan.speech.mel.Mel` and their files; griffin_lim, iterations; temperature, of the noise at
                the start.

        Raises:
            ValueError: a file that is no sound or silent, a mel that was made with other constants.
        """
        given = settings.pop("input", None)
        if not isinstance(self.medium.state, Magnitude) and settings.get("griffin_lim") is not None:
            raise RunError(f"{self.folder} draws phases too: it has no griffin_lim to choose")
        found = super().sampler(**settings)
        if not isinstance(self.medium.state, Magnitude):
            del found.how["griffin_lim"]
        if given is None:
            return found
        return dataclasses.replace(found, items=self._read([given] if isinstance(given, GIVEN) else given))

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        if weak := given.get("weak"):
            other = weak if isinstance(weak, VocoderRun) else VocoderRun.open(weak)
            self.medium.analysis.check(other.medium.analysis)
            given = dict(given) | {"weak": other}
        return super()._settings(given)

    def _read(self, given: Iterable[Any]) -> list[tuple[str, Tensor | Mel]]:
        found: list[tuple[str, Tensor | Mel]] = []
        for one in given:
            if isinstance(one, str | Path) and Path(one).suffix == Mel.suffix:
                one = Mel.load(one)
            if isinstance(one, Mel):
                self.medium.analysis.check(one.analysis)
                found.append((one.name, one))
            elif isinstance(one, Tensor):
                found.append((f"wave-{len(found)}", one))
            else:
                (name,), (wave,) = self.medium.read_files([one])
                found.append((name, wave))
        if not found:
            raise ValueError("nothing to make anew: give at least one sound file")
        for name, clip in found:
            seconds = (clip.samples if isinstance(clip, Mel) else len(clip)) / self.medium.analysis.rate
            if seconds > (longest := self.medium.state.longest):
                raise ValueError(
                    f"{name} has {seconds:.0f} s, and at most {longest:.0f} s are made in one piece: cut it"
                )
        return found

    def held_out(self) -> list[tuple[str, Any]]:
        part = self.data.held_out
        return list(zip(part.names, part.waves, strict=True))

    def wave(self, sampler: Speaker, item: Tensor | Mel, seed: int) -> Tensor:
        """The wave (N,) of a mel, or of the mel of a wave."""
        mel = item if isinstance(item, Mel) else Mel.of(item, self.medium.analysis)
        values, state = mel.values[None], self.medium.state
        x = self.drawn(sampler, told(values), state.shape(values.shape[2]), seed)
        return state.decode(x, values, mel.samples, sampler.griffin_lim)[0]

    def page(
        self, waves: Sequence[Tensor], items: Sequence[tuple[str, Any]], path: Path, notes: Mapping[str, Any]
    ) -> Path:
        """Spectrograms side by side: what was given, what Griffin-Lim makes of its mel, and ours."""
        if any(isinstance(clip, Mel) for _, clip in items):
            return super().page(waves, items, path, notes)
        seen = MOST * self.medium.analysis.hop
        rows = [
            [clip[:seen], self.medium.griffin_lim(clip[:seen]), wave[:seen]]
            for wave, (_, clip) in zip(waves, items, strict=True)
        ]
        headings = [NAMES[name] for name in ("natural", "griffin_lim", "samples")]
        return save_page(rows, self.medium.analysis, path.with_suffix(".png"), notes, headings)

    def followed(self, step: int, items: Sequence[tuple[str, Any]], waves: Sequence[Tensor]) -> None:
        """Their distances from the natural ones, as a line of quality.jsonl; a step that is done again counts anew."""
        found = judge([wave for _, wave in items], waves, None, self.medium.analysis)
        kept = [one for one in self.log(FOLLOWED) if one["step"] < step] + [{"step": step} | dataclasses.asdict(found)]
        write(self.folder / FOLLOWED, "".join(json.dumps(plain(one)) + "\n" for one in kept))

    def curve(self) -> list[dict[str, Any]]:
        """How good it was while training: the measures of the first held-out recordings after so many minutes."""
        minutes = {record["step"]: record["seconds"] / 60 for record in self.log()}
        return [one | {"minutes": minutes[one["step"]]} for one in self.log(FOLLOWED) if one["step"] in minutes]

    def quality(self, n: int, **settings: Any) -> Mapping[str, Any]:
        """Of n held-out clips at most: their waves beside Griffin-Lim's and the natural ones, and what they took."""
        items = self.held_out()[:n]
        sampler = self.sampler(**settings)
        waves = self.sample(len(items), progress=Progress("samples"), **settings)
        return self.medium.quality(waves, None) | self.timed(sampler, items, waves)

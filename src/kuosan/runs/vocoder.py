"""The run of a vocoder: a diffusion run whose samples are waves, each of the mel that it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuosan.progress import Progress
from kuosan.runs.diffusion import OF_TEXTS, DiffusionRun, unmeasured_solver
from kuosan.runs.run import device
from kuosan.sampler import Sampler, Settings
from kuosan.seeds import stream
from kuosan.solvers import check_seeds, sample_batches
from kuosan.speech.audio import read_audio
from kuosan.speech.judge import real_time_factor
from kuosan.speech.medium import NAMES, SpeechMedium
from kuosan.speech.mel import Mel
from kuosan.speech.pictures import save_page
from kuosan.speech.states import told

#: Windows that the reverse variance is measured on.
MEASURED_ON = 256
#: Clips of which a sheet is made while training.
SHOWN = 4


@dataclass(frozen=True)
class Vocoder(Sampler):
    """A sampler of waves, each of a mel.

    Args:
        clips: names, and waves to be analysed and made anew, or mels alone; None: the held-out clips of the data.
        griffin_lim: iterations that find phases, where the model makes magnitudes.
        temperature: of the noise that sampling begins with: its standard deviation is so many times what it should be.
    """

    clips: Sequence[tuple[str, Tensor | Mel]] | None = None
    griffin_lim: int = 32
    temperature: float = 1.0


class VocoderRun(DiffusionRun):
    """A trained (or half-trained) vocoder: a diffusion model that is told a mel."""

    families = ("vocoder",)
    has_ode = False
    at_once = 1  # each clip has a length of its own
    foreign = tuple(name for name in OF_TEXTS if name != "temperature")
    medium: SpeechMedium

    def states(self, part: Any) -> tuple[Tensor, Tensor | None]:
        """Some windows of a part: all of them would not fit into memory."""
        chosen = torch.randperm(self.medium.size(part), generator=stream("states"))[:MEASURED_ON]
        return self.medium.batch(part, chosen)

    def labels_for(self, n: int) -> Tensor:
        """The mels of n training windows, as the network is told them, spread over the recordings."""
        part = self.data.train
        return self.medium.batch(part, torch.linspace(0, self.medium.size(part) - 1, n).long())[1]

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sampler(self, **settings: Any) -> Vocoder:
        """As of any diffusion run.

        Args:
            settings: beside those: input, sound files to be analysed and made anew, waves (N,) at the model's rate, or
                :class:`~kuosan.speech.mel.Mel`; griffin_lim, iterations; temperature, of the noise at the start.

        Raises:
            ValueError: a file that is no sound or silent, a mel that was made with other constants.
        """
        given = settings.pop("input", None)
        found = super().sampler(**settings)
        own = {key: settings.get(key) for key in ("griffin_lim", "temperature")}
        section = Settings.of(self.recipe.sampling, **own).section
        one = isinstance(given, str | Path | Tensor | Mel)
        clips = None if given is None else self._read([given] if one else given)
        found.how.update(temperature=section.temperature)
        if self.recipe.data.speech is not None and self.recipe.data.speech.state == "magnitude":
            found.how.update(griffin_lim=section.griffin_lim)
        fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(Sampler)}
        return Vocoder(**fields, clips=clips, griffin_lim=section.griffin_lim, temperature=section.temperature)

    def _read(self, given: Iterable[Any]) -> list[tuple[str, Tensor | Mel]]:
        clips: list[tuple[str, Tensor | Mel]] = []
        for one in given:
            if isinstance(one, str | Path) and Path(one).suffix == Mel.suffix:
                one = Mel.load(one)
            if isinstance(one, Mel):
                self.medium.analysis.check(one.analysis)
                clips.append((one.name, one))
            elif isinstance(one, Tensor):
                clips.append((f"wave-{len(clips)}", one))
            else:
                (name,), (wave,) = self.medium.read_files([one])
                clips.append((name, wave))
        if not clips:
            raise ValueError("nothing to make anew: give at least one sound file")
        return clips

    def clips(self, sampler: Vocoder, n: int) -> list[tuple[str, Tensor | Mel]]:
        """The first n clips that a sampler makes anew, by name.

        Raises:
            ValueError: there are not so many.
        """
        found = sampler.clips
        if found is None:
            part = self.data.held_out
            found = list(zip(part.names, part.waves, strict=True))
        if n > len(found):
            what = "given" if sampler.clips is not None else "held out"
            raise ValueError(f"{n} samples are asked for, and there are {len(found)} clips {what}: one for each")
        return list(found[:n])

    def batches(  # type: ignore[override]
        self, sampler: Vocoder, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int | None = None
    ) -> Iterator[list[Tensor]]:
        """The waves of a sampler's clips one by one, each (N,) on the CPU, with noise of its own seed."""
        for seed, (_, clip) in zip(seeds, self.clips(sampler, len(seeds)), strict=True):
            if isinstance(clip, Mel):
                mel, n = clip.values[None], clip.samples
            else:
                mel, n = self.medium.analysis.mel(clip[None]), len(clip)
            yield [self.vocode(sampler, mel, n, seed)]

    def vocode(self, sampler: Vocoder, mel: Tensor, n: int, seed: int = 0) -> Tensor:
        """The wave (n,) of a log-mel (1, M, T)."""
        state = self.medium.state
        (x,) = sample_batches(
            sampler.model,
            state.shape(mel.shape[2]),
            sampler.table,
            seeds=[seed],
            condition=told(mel),
            transform=sampler.transform,
            corrector=sampler.corrector,
            temperature=sampler.temperature,
            device=device(),
        )
        return state.decode(x, mel, n, sampler.griffin_lim)[0]

    def sample(  # type: ignore[override]
        self,
        count: int | None = None,
        *,
        seeds: Iterable[int] | None = None,
        progress: Any = None,
        **settings: Any,
    ) -> list[Tensor]:
        """Waves (N,): of sound files, waves or mels that are given as ``input``, or of the first held-out clips.

        Args:
            count: how many; by default as many as are given.
            seeds: of the noise, one for each; default 0, 1, 2, ...
            progress: called with (done, all) after each.
            settings: of :meth:`sampler`.

        Raises:
            ValueError: see :meth:`sampler`; or there are not so many clips.
        """
        sampler = self.sampler(**settings)
        if count is None and seeds is None:
            if sampler.clips is None:
                raise ValueError("give count, seeds, or input: what is to be made anew")
            count = len(sampler.clips)
        seeds = check_seeds(range(count or 0) if seeds is None else seeds)
        if count is not None and count != len(seeds):
            raise ValueError(f"count is {count}, but there are {len(seeds)} seeds: one for each sample")
        waves: list[Tensor] = []
        for batch in self.batches(sampler, seeds):
            waves += batch
            if progress is not None:
                progress(len(waves), len(seeds))
        return waves

    def names(self, sampler: Vocoder, seeds: Sequence[int], labels: Tensor | None) -> list[str]:
        """Those of the clips."""
        named = [name for name, _ in self.clips(sampler, len(seeds))]
        return [name.replace("/", "-") if named.count(name) == 1 else f"{i}-{name}" for i, name in enumerate(named)]

    def sheet(
        self, sampler: Vocoder, samples: Sequence[Path], columns: int | None, path: Path, notes: Mapping[str, Any]
    ) -> Path:
        """Spectrograms side by side: what was given, what Griffin-Lim makes of its mel, and ours."""
        waves = [read_audio(file)[0] for file in samples[:SHOWN]]
        return self._page(waves, [clip for _, clip in self.clips(sampler, len(waves))], path, notes)

    def _page(self, waves: Sequence[Tensor], clips: Sequence[Tensor | Mel], path: Path, notes: Mapping[str, Any]) -> Path:
        rows = [
            [wave] if isinstance(clip, Mel) else [clip, self.medium.griffin_lim(clip), wave]
            for wave, clip in zip(waves, clips, strict=True)
        ]
        headings = [NAMES[name] for name in ("natural", "griffin_lim", "samples")][: len(rows[0])]
        return save_page(rows, self.medium.analysis, path.with_suffix(".png"), notes, headings)

    def sheet_while_training(self, model: Any, step: int) -> None:
        """The first held-out clips made anew, in samples/step-..."""
        clips, sampling = self.data.held_out.waves[:SHOWN], self.recipe.sampling
        table = unmeasured_solver(self.recipe).table(model.process, steps=min(20, sampling.steps))
        sampler = Vocoder(model, table, None, None, {}, None, sampling.griffin_lim, sampling.temperature)
        waves = [self.vocode(sampler, self.medium.analysis.mel(clip[None]), len(clip)) for clip in clips]
        self._page(waves, clips, self.folder / "samples" / f"step-{step:08d}", {"step": step})

    # -- measuring ----------------------------------------------------------------------------------------------------

    def quality(self, n: int, **settings: Any) -> Mapping[str, Any]:
        """Of n held-out clips at most: their waves beside Griffin-Lim's and the natural ones, and what they took.

        The real-time factor is that of the longest clip, by one thread or as many as torch has.
        """
        n = min(n, len(self.data.held_out))
        sampler = self.sampler(**settings)
        waves = self.sample(n, progress=Progress("samples"), **settings)
        rows = self.medium.quality(waves, None)
        longest = max(self.data.held_out.waves[:n], key=len)
        mel = self.medium.analysis.mel(longest[None])
        factor = real_time_factor(lambda: self.vocode(sampler, mel, len(longest)), self.medium.analysis.rate)
        speed = {"real_time_factor": factor, "threads": torch.get_num_threads()}
        return rows | speed | {"guidance": 0.0, "evaluations": sampler.how["evaluations"]}

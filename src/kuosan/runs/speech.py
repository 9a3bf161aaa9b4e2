"""What the runs of speech share: samples are waves, each of a length of its own."""

from __future__ import annotations

import dataclasses
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuosan.runs.diffusion import OF_IMAGES, OF_TEXTS, DiffusionRun, unmeasured_solver
from kuosan.runs.run import RunError, device
from kuosan.sampler import Sampler, Settings
from kuosan.solvers import check_seeds, sample_batches
from kuosan.speech.audio import read_audio
from kuosan.speech.judge import real_time_factor
from kuosan.speech.medium import SpeechMedium

#: Windows that the reverse variance is measured on.
MEASURED_ON = 256
#: Waves that a sheet shows.
SHOWN = 8
#: Characters of the name of a file.
LONGEST = 60
#: Settings of sampling that no speech has.
FOREIGN = (*(name for name in OF_TEXTS if name != "temperature"), *OF_IMAGES, "known", "mask", "corrections")


@dataclass(frozen=True)
class Speaker(Sampler):
    """A sampler of waves.

    Args:
        items: what each wave is made of, by name; None: the held-out recordings of the data.
        griffin_lim: iterations that find phases, where magnitudes are made.
        temperature: of the noise that sampling begins with: its standard deviation is so many times the prior's.
    """

    items: Sequence[tuple[str, Any]] | None = None
    griffin_lim: int = 32
    temperature: float = 1.0


class SpeechRun(DiffusionRun):
    """What the runs of speech share: samples are waves, each of a length of its own, made one by one."""

    has_ode = False
    usual = ()
    at_once = 1
    medium: SpeechMedium

    def labels_for(self, n: int) -> None:
        """None: speech has no classes."""

    def usual_count(self, sampler: Any) -> int:
        """One for each thing that is given; of held-out recordings 16."""
        return min(16, len(self.held_out())) if sampler.items is None else len(sampler.items)

    def evaluate(self, measures: Sequence[str] | None = None, **settings: Any) -> dict[str, Any]:
        """The quality of samples, and of a vocoder the bound of its states if that is asked for: a density.

        Args:
            measures, settings: of :meth:`Run.evaluate <kuosan.runs.Run.evaluate>`.
        """
        if settings.get("split", "held_out") != "held_out" and settings.get("quality", True):
            raise RunError("the quality of speech is of held-out recordings: drop the split")
        if settings.get("files") is not None:
            raise RunError("recordings of your own are not scored: `kuosan sample RUN --input` makes them anew")
        return super().evaluate(measures, **settings)

    @abstractmethod
    def held_out(self) -> list[tuple[str, Any]]:
        """What the waves of the held-out recordings are made of, by name."""

    @abstractmethod
    def wave(self, sampler: Any, item: Any, seed: int) -> Tensor:
        """The wave (N,) of one thing."""

    def sampler(self, **settings: Any) -> Speaker:
        """As of any diffusion run, with griffin_lim, iterations, and temperature, of the noise at the start."""
        found = super().sampler(**settings)
        own = {key: settings.get(key) for key in ("griffin_lim", "temperature")}
        section = Settings.of(self.recipe.sampling, **own).section
        found.how.update(temperature=section.temperature, griffin_lim=section.griffin_lim)
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(Sampler)}
        return Speaker(**parts, griffin_lim=section.griffin_lim, temperature=section.temperature)

    def share(self, sampler: Any, places: Sequence[int]) -> Any:
        items = self.items(sampler, max(places) + 1)
        return dataclasses.replace(sampler, items=[items[i] for i in places])

    def items(self, sampler: Speaker, n: int) -> list[tuple[str, Any]]:
        """What the first n waves are made of, by name.

        Raises:
            ValueError: there is not so much.
        """
        found = self.held_out() if sampler.items is None else list(sampler.items)
        if n > len(found):
            what = "recordings are held out" if sampler.items is None else "things are given"
            raise ValueError(f"{n} samples are asked for, and {len(found)} {what}: one for each")
        return found[:n]

    def drawn(self, sampler: Speaker, condition: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
        """The state (1, *shape) that the model draws, told a condition (1, ...)."""
        (x,) = sample_batches(
            sampler.model,
            shape,
            sampler.table,
            seeds=[seed],
            condition=condition,
            transform=sampler.transform,
            corrector=sampler.corrector,
            temperature=sampler.temperature,
            device=device(),
        )
        return x

    def batches(  # type: ignore[override]
        self, sampler: Speaker, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int | None = None
    ) -> Iterator[list[Tensor]]:
        """The waves one by one, each (N,) on the CPU, with noise of its own seed."""
        for seed, (_, item) in zip(seeds, self.items(sampler, len(seeds)), strict=True):
            yield [self.wave(sampler, item, seed)]

    def sample(  # type: ignore[override]
        self,
        count: int | None = None,
        *,
        seeds: Iterable[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> list[Tensor]:
        """Waves (N,), of what is given, or of the first held-out recordings.

        Args:
            count: how many; by default as many as things are given.
            seeds: of the noise, one for each; default 0, 1, 2, ...
            progress: called with (done, all) after each.
            settings: of :meth:`sampler`.

        Raises:
            ValueError: see :meth:`sampler`; or there are not so many things to make waves of.
        """
        sampler = self.sampler(**settings)
        if count is None and seeds is None:
            if sampler.items is None:
                raise ValueError("give count, seeds, or what waves are to be made of")
            count = len(sampler.items)
        seeds = check_seeds(range(count or 0) if seeds is None else seeds)
        if count is not None and count != len(seeds):
            raise ValueError(f"count is {count}, but there are {len(seeds)} seeds: one for each sample")
        waves: list[Tensor] = []
        for batch in self.batches(sampler, seeds):
            waves += batch
            if progress is not None:
                progress(len(waves), len(seeds))
        return waves

    def names(self, sampler: Speaker, seeds: Sequence[int], labels: Tensor | None) -> list[str]:
        items = self.items(sampler, len(seeds))
        named = [re.sub(r"[^\w.+-]+", "-", name)[:LONGEST].strip("-.") or "wave" for name, _ in items]
        found: list[str] = []
        for i, name in enumerate(named):
            if named.count(name) > 1:
                name = f"{name}-{i}"
            while name in found or (name != named[i] and name in named):
                name += "-again"
            found.append(name)
        return found

    def while_training(self, model: Any) -> Speaker:
        """A sampler of a model in training."""
        sampling = self.recipe.sampling
        table = unmeasured_solver(self.recipe).table(model.process, steps=min(20, sampling.steps))
        return Speaker(model, table, None, None, {}, None, sampling.griffin_lim, sampling.temperature)

    def sheet_while_training(self, model: Any, step: int) -> None:
        """The first held-out recordings, in samples/step-..."""
        sampler, items = self.while_training(model), self.held_out()[:SHOWN]
        waves = [self.wave(sampler, item, seed) for seed, (_, item) in enumerate(items)]
        self.page(waves, items, self.folder / "samples" / f"step-{step:08d}", {"step": step})
        self.followed(step, items, waves)

    def followed(self, step: int, items: Sequence[tuple[str, Any]], waves: Sequence[Tensor]) -> None:
        """What is kept of waves that were made while training."""

    def sheet(
        self, sampler: Speaker, samples: Sequence[Path], columns: int | None, path: Path, notes: Mapping[str, Any]
    ) -> Path:
        waves = [read_audio(file)[0] for file in samples[:SHOWN]]
        return self.page(waves, self.items(sampler, len(waves)), path, notes)

    def page(
        self, waves: Sequence[Tensor], items: Sequence[tuple[str, Any]], path: Path, notes: Mapping[str, Any]
    ) -> Path:
        """Spectrograms of waves, and of what they were made of where that is sound."""
        return self.medium.sheet(waves, path, None, notes)

    def timed(self, sampler: Speaker, items: Sequence[tuple[str, Any]], waves: Sequence[Tensor]) -> dict[str, Any]:
        """How long the longest of some waves takes to be made, against how long it lasts."""
        longest = max(range(len(waves)), key=lambda i: len(waves[i]))
        factor = real_time_factor(lambda: self.wave(sampler, items[longest][1], 0), self.medium.analysis.rate)
        about = {"threads": torch.get_num_threads(), "evaluations": sampler.how["evaluations"]}
        return {"real_time_factor": factor, "way": self.way(sampler)} | about | {"guidance": sampler.how["guidance"]}

    @staticmethod
    def way(sampler: Speaker) -> dict[str, Any]:
        """What waves depend on beside the weights: figures of one way are not those of another."""
        named = ("solver", "grid", "evaluations", "guidance", "temperature", "griffin_lim", "vocoder", "precision")
        return {key: sampler.how[key] for key in named if key in sampler.how}

"""The runs of speech: a vocoder, whose samples are waves of the mels that it is told, and text to speech."""

from __future__ import annotations

import dataclasses
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuosan.plain import plain
from kuosan.progress import Progress
from kuosan.runs.diffusion import OF_TEXTS, DiffusionRun, unmeasured_solver
from kuosan.runs.run import RunError, device, write
from kuosan.sampler import Sampler, Settings
from kuosan.seeds import stream
from kuosan.solvers import check_seeds, sample_batches
from kuosan.speech.acoustic import Acoustic
from kuosan.speech.alignment import expand
from kuosan.speech.audio import read_audio
from kuosan.speech.judge import judge, real_time_factor
from kuosan.speech.medium import NAMES, SpeechMedium
from kuosan.speech.mel import Mel
from kuosan.speech.phonemes import encode
from kuosan.speech.pictures import MOST, save_page
from kuosan.speech.states import Magnitude, told, untold
from kuosan.speech.transcribed import TranscribedMedium

#: Windows that the reverse variance is measured on.
MEASURED_ON = 256
#: Waves that a sheet shows.
SHOWN = 8
#: Characters of the name of a file.
LONGEST = 60
#: Times as fast as the voice speaks by itself, and seconds.
SPEEDS, MOST_SECONDS = (0.1, 10.0), 600.0
#: Settings of sampling that are of one kind of speech model only.
OF_VOCODERS = ("input",)
OF_TEXT_TO_SPEECH = ("text", "vocoder", "speed", "seconds")
#: Settings of sampling that no speech has.
FOREIGN = (*(name for name in OF_TEXTS if name != "temperature"), "known", "mask", "corrections")


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
        path = self.folder / "quality.jsonl"
        kept = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
        kept = [one for one in kept if one["step"] < step] + [{"step": step} | dataclasses.asdict(found)]
        write(path, "".join(json.dumps(plain(one)) + "\n" for one in kept))

    def quality(self, n: int, **settings: Any) -> Mapping[str, Any]:
        """Of n held-out clips at most: their waves beside Griffin-Lim's and the natural ones, and what they took."""
        items = self.held_out()[:n]
        sampler = self.sampler(**settings)
        waves = self.sample(len(items), progress=Progress("samples"), **settings)
        return self.medium.quality(waves, None) | self.timed(sampler, items, waves)


#: What a vocoder takes one of.
GIVEN = (str, Path, Tensor, Mel)


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

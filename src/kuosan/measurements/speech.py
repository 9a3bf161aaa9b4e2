"""What the reports of speech measure: waves beside waves, heard and timed; and of a vocoder, its distances."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kuosan import figures
from kuosan.figures import THIRD, Panel
from kuosan.measurements.base import Measurements
from kuosan.progress import Progress
from kuosan.runs import VocoderRun
from kuosan.seeds import stream
from kuosan.solvers import Auto
from kuosan.speech.judge import judge
from kuosan.speech.medium import MEASURES, NAMES, SpeechMedium
from kuosan.speech.pictures import spectrograms

EVALUATIONS = (1, 2, 3, 6, 12, 25)
TEMPERATURES = (0.125, 0.25, 0.5, 0.75, 1.0)
#: Recordings that can be listened to, preferably of so many seconds.
SHOWN, BEST = 6, (1.0, 6.0)
#: Bytes of sound on a page: three waves of each recording, of 16 bits, in base64.
SOUND = 4.7e6
#: Recordings that are measured, however slow the model.
LEAST = 3
PANELS = tuple(Panel(key, MEASURES[key][0], f"{key}_error", from_zero=False) for key in list(MEASURES)[:3])
#: What is diffused, in words.
STATES = {
    "magnitude": "log-magnitudes; phases by Griffin-Lim",
    "spectrum": "the complex spectrum",
    "wave": "the wave itself",
}


class SpeechMeasurements(Measurements):
    """What the reports of speech share. There is no bound among them: it is on a density, and of states.

    Attributes:
        columns: the waves of a recording that are compared, and their names: the natural one first, ours last.
    """

    columns: ClassVar[Mapping[str, str]]

    def __init__(self, run: Any, budget: float):
        self.medium: SpeechMedium = run.medium
        self.analysis, self.clips = run.medium.analysis, run.data.held_out
        self._made: dict[tuple[str, int], Tensor] = {}  # with the recipe's settings
        self._seconds: dict[str, list[float]] = {name: [] for name in self._others}  # that a second of speech took
        super().__init__(run, budget)

    @property
    def _others(self) -> list[str]:
        """The columns that are made, ours first."""
        return list(self.columns)[:0:-1]

    @abstractmethod
    def make(self, name: str, i: int) -> Tensor:
        """The wave of a column, of recording i, with the noise of seed i, as by `kuosan sample`."""

    @abstractmethod
    def once(self, i: int) -> None:
        """What is done for recording i once, whatever the number of evaluations, except that it is heard."""

    @abstractmethod
    def compared(self, chosen: Sequence[int], rows: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        """The quality of each column's waves of some recordings."""

    def facts(self) -> tuple[dict[str, Any], None]:
        found, data = super().facts()[0], self.run.data
        seconds = {name: int(getattr(data, name).lengths.sum()) / data.rate for name in ("train", "held_out")}
        words = {"one": "recording", "many": "recordings", "seconds": seconds}
        return found | words | {"analysis": self.analysis.plain()}, None

    def way_of_sampling(self) -> dict[str, Any]:
        how, solver = self.run.sampler().how, self.run.recipe.sampling.solver
        words = ", ".join([str(solver["kind"]), *(f"{k} = {v}" for k, v in solver.items() if k != "kind")])
        named = {"solver": how["solver"] if how["solver"].startswith("tuned (") else words}
        kept = {key: how[key] for key in ("evaluations", "temperature", "guidance")}
        return named | kept | {"griffin_lim": self.run.recipe.sampling.griffin_lim}

    def tries(self, counts: Iterable[int]) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
        """Settings of sampling with about so many steps and one solver: its name; of each, evaluations and settings."""
        sampling = self.run.recipe.sampling
        fixed = sampling.solver["kind"] in ("auto", "tuned") and sampling.grid is None
        rule: dict[str, Any] = {"solver": Auto(tuned=False)} if fixed else {}  # not a tuned table here and there
        found = []
        for steps in counts:
            how = {"steps": steps, **rule}
            try:
                found.append((self.run.sampler(**how).how["evaluations"], how))
            except ValueError:  # fewer steps than the solver's order, or more than the schedule has
                continue
        return "auto" if fixed else self.way_of_sampling()["solver"], found

    # -- how much can be afforded -------------------------------------------------------------------------------------

    @cached_property
    def _beside(self) -> tuple[float, float]:
        """Seconds that a second of speech takes beside evaluations: to be finished and measured, and to be heard."""
        i = self._order[0]
        length = self._length(i)
        for _ in range(2):  # the first call is always slow
            begun = time.monotonic()
            self.once(i)
            measured = time.monotonic() - begun
        if self.run.judge is None:
            return measured / length, 0.0
        begun = time.monotonic()
        self.run.judge(self.clips.waves[i])
        return measured / length, (time.monotonic() - begun) / length

    def takes(self, evaluations: int) -> float:
        """Seconds to make and measure a second of speech."""
        assert self.run.recipe.data.speech is not None
        window = self.run.recipe.data.speech.frames * self.analysis.hop / self.analysis.rate
        return evaluations * self.cost / window + self._beside[0]

    @property
    def _row_takes(self) -> float:
        """Seconds to make all columns of a second of speech, and to hear them."""
        all_made = self.takes(self.run.sampler().how["evaluations"]) + self._beside[0]
        return all_made + len(self.columns) * self._beside[1]

    def affordable(self, section: str, order: Iterable[int], each: float, least: int = LEAST) -> list[int]:
        """As many recordings as a section can have if a second of speech takes so long."""
        found: list[int] = []
        left = self.shares[section] * self.budget / each
        for i in order:
            left -= self._length(i)
            if len(found) >= least and left < 0:
                break
            found.append(i)
        return found

    # -- which recordings ---------------------------------------------------------------------------------------------

    def _length(self, i: int) -> float:
        """In seconds."""
        return len(self.clips.waves[i]) / self.analysis.rate

    def _says(self, i: int) -> str:
        return self.clips.texts[i] if self.clips.texts is not None else ""

    @cached_property
    def _order(self) -> list[int]:
        """The held-out recordings as they are measured: at random, always the same way."""
        return torch.randperm(len(self.clips), generator=stream("report")).tolist()

    @cached_property
    def _shown(self) -> list[int]:
        """Recordings to listen to: not chosen by ear, but evenly from those with words and of a good length."""

        def off(i: int) -> float:
            return max(BEST[0] - self._length(i), self._length(i) - BEST[1], 0.0)

        best = [i for i in range(len(self.clips)) if self._says(i) and not off(i)]
        others = sorted(set(range(len(self.clips))) - set(best), key=lambda i: (off(i), not self._says(i), i))
        each = self._row_takes
        for most in range(SHOWN, 0, -1):
            places = np.unique(np.linspace(0, len(best) - 1, min(most, len(best))).round().astype(int))
            chosen = [*(best[k] for k in places), *others][:most]
            if most <= LEAST or self.affordable("samples", chosen, each) == chosen:
                break
        return sorted(chosen)

    # -- sounds -------------------------------------------------------------------------------------------------------

    def wave(self, name: str, i: int) -> Tensor:
        """As :meth:`make`, made once and timed."""
        if name not in self._others:
            return self.clips.waves[i]
        if (name, i) not in self._made:
            begun = time.monotonic()
            made = self._made[name, i] = self.make(name, i)
            self._seconds[name].append((time.monotonic() - begun) / (len(made) / self.analysis.rate))
        return self._made[name, i]

    @property
    def drawn(self) -> list[Tensor]:  # type: ignore[override]
        return [self.wave(self._others[0], i) for i in self._shown]

    def samples(self) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
        most = int(SOUND / (3 * 2 * 4 / 3) / SHOWN)  # samples of one wave
        found: list[dict[str, Any]] = []
        pictures = []
        progress = Progress("recordings")
        for i in self._shown:
            waves = {name: self.wave(name, i) for name in self.columns}
            heard = {name: self.run.judge(wave) for name, wave in waves.items()} if self.run.judge else None
            cut = {name: wave[:most] for name, wave in waves.items()}
            longest = max(map(len, cut.values()))
            pictures.append(
                [
                    {
                        "name": self.columns[name],
                        "key": name,
                        "image": figures.png(image),
                        "width": 100 * len(wave) / longest,
                        "sound": figures.sound(wave, self.analysis.rate),
                    }
                    for (name, wave), image in zip(
                        cut.items(), spectrograms(list(cut.values()), self.analysis), strict=True
                    )
                ]
            )
            said = None if self.clips.transcripts is None else self.clips.transcripts[i] or None
            made = {name: len(wave) / self.analysis.rate for name, wave in waves.items()}
            lengths = {"seconds": self._length(i), "shown": longest / self.analysis.rate, "lasts": made}
            found.append({"name": self.clips.names[i], "seed": i, "text": said, "heard": heard} | lengths)
            progress(len(found), len(self._shown))
        longer = any(max(clip["lasts"].values()) > clip["shown"] for clip in found)
        return self.way_of_sampling() | {"clips": found, "cut": longer}, pictures

    # -- measures -----------------------------------------------------------------------------------------------------

    def quality(self) -> dict[str, Any]:
        """Of each column; how long they take is always measured here, all in one place."""
        found: dict[str, Any] = dict((self.evaluation or {}).get("quality") or {})
        sampler = self.run.sampler()
        how = sampler.how
        known = set(self.columns) <= found.keys() and found.get("way") == self.run.way(sampler)
        if not known:
            chosen = self.affordable("quality", self._order, self._row_takes)
            progress = Progress("quality")
            rows: dict[str, list[Tensor]] = {name: [] for name in self.columns}
            for done, i in enumerate(chosen, 1):
                for name, waves in rows.items():
                    waves.append(self.wave(name, i))
                progress(done, len(chosen))
            found = self.compared(chosen, rows)
            found |= {"evaluations": how["evaluations"], "guidance": how["guidance"]}
        return found | {"from_evaluation": known, "held_out": len(self.clips), "speed": self._speed()}

    def _speed(self) -> dict[str, Any]:
        """Seconds for a second of speech, of the same recordings one by one."""
        found: dict[str, Any] = {"recordings": len(self._seconds["samples"]), "threads": torch.get_num_threads()}
        for name, taken in self._seconds.items():
            found[name] = fmean(taken)
            found[f"{name}_error"] = stdev(taken) / len(taken) ** 0.5 if len(taken) > 1 else None
        return found


class VocoderMeasurements(SpeechMeasurements):
    """The measurements of a vocoder's report."""

    run: VocoderRun
    page = "speech.html"
    kind = "A vocoder"
    sections = ("facts", "samples", "loss", "curve", "evaluations", "temperature")
    shares: ClassVar[Mapping[str, float]] = {"samples": 0.3, "quality": 0.2, "evaluations": 0.3, "temperature": 0.2}
    columns: ClassVar[Mapping[str, str]] = {name: NAMES[name] for name in ("natural", "griffin_lim", "samples")}

    @property
    def model_in_words(self) -> dict[str, str]:
        recipe = self.run.recipe
        assert recipe.network is not None
        assert recipe.process is not None
        assert recipe.data.speech is not None
        return {
            "diffuses": STATES[recipe.data.speech.state],
            "network": recipe.network["kind"],
            "predicts": recipe.denoiser.predicts,
            "noise schedule": recipe.process["kind"],
        }

    def facts(self) -> tuple[dict[str, Any], None]:
        measures = {key: {"name": name, "form": form} for key, (name, form) in MEASURES.items()}
        return super().facts()[0] | {"measures": measures}, None

    def one_evaluation(self, samples: int) -> None:
        part = self.run.data.train
        x, condition = self.medium.batch(part, torch.arange(samples) % self.medium.size(part))
        place = next(self.run.denoiser.parameters()).device
        with torch.no_grad():
            self.run.denoiser(x.to(place), torch.full((samples,), 0.5, device=place), condition.to(place))

    # -- sounds -------------------------------------------------------------------------------------------------------

    def _draw(self, chosen: Sequence[int], **settings: Any) -> list[Tensor]:
        """Recordings made anew; number k with the noise of seed k, as by `kuosan sample`."""
        return self.run.sample(input=[self.clips.waves[i] for i in chosen], seeds=list(chosen), **settings)

    def make(self, name: str, i: int) -> Tensor:
        return self._draw([i])[0] if name == "samples" else self.medium.griffin_lim(self.clips.waves[i])

    def once(self, i: int) -> None:
        (wave,) = self._draw([i], solver={"kind": "ddim"}, steps=1)
        self._judged([i], [wave])

    # -- measures -----------------------------------------------------------------------------------------------------

    def _judged(self, chosen: Sequence[int], waves: Sequence[Tensor], words: bool = False) -> dict[str, Any]:
        """The measures of waves made of some recordings; those of words only where it is known what is said."""
        words = words and any(map(self._says, chosen))
        texts, recogniser = (list(map(self._says, chosen)), self.run.judge) if words else (None, None)
        natural = [self.clips.waves[i] for i in chosen]
        return asdict(judge(natural, waves, texts, self.analysis, recogniser))

    def compared(self, chosen: Sequence[int], rows: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        return {name: self._judged(chosen, waves, self.run.judge is not None) for name, waves in rows.items()}

    def curve(self) -> tuple[dict[str, Any] | None, list[str] | None]:
        """How the distances fell while training, of the first held-out recordings."""
        points = self.run.curve()
        if len(points) < 2:
            return None, None
        first = range(points[0]["utterances"])
        beside = self._judged(first, [self.medium.griffin_lim(self.clips.waves[i]) for i in first])
        minutes = [point["minutes"] for point in points]
        return {"points": points, "griffin_lim": beside}, self._plots(
            "minutes of training", minutes, points, beside, named=False
        )

    # -- sweeps -------------------------------------------------------------------------------------------------------

    def evaluations(self) -> tuple[dict[str, Any], list[str]]:
        solver, settings = self.tries(EVALUATIONS)
        least = sum(map(self._length, self._order[:LEAST]))
        allowed = self.shares["evaluations"] * self.budget
        while len(settings) > 4 and sum(self.takes(count) for count, _ in settings) * least > allowed:
            settings.pop()
        counts, tries = [count for count, _ in settings], [how for _, how in settings]
        found, plots = self._sweep("evaluations", counts, tries, counts, log=True)
        return found | {"solver": solver, "temperature": self.run.recipe.sampling.temperature}, plots

    def temperature(self) -> tuple[dict[str, Any], list[str]]:
        found = self.run.sampler().how["evaluations"]
        tries = [{"temperature": value} for value in TEMPERATURES]
        numbers, plots = self._sweep("temperature", TEMPERATURES, tries, [found] * len(tries), log=False)
        return numbers | {"evaluations": found}, plots

    def _sweep(
        self,
        name: str,
        settings: Sequence[float],
        tries: Sequence[Mapping[str, Any]],
        counts: Sequence[int],
        log: bool,
    ) -> tuple[dict[str, Any], list[str]]:
        """Make the same recordings anew with each setting, with the same noise, and measure each set."""
        chosen = self.affordable(name, self._order, sum(map(self.takes, counts)))
        progress, points = Progress(name), []
        kept = [key for panel in PANELS for key in (panel.key, panel.error) if key]
        for done, (setting, how) in enumerate(zip(settings, tries, strict=True), 1):
            begun = time.monotonic()
            waves = self._draw(chosen, **how)
            took = (time.monotonic() - begun) / sum(map(self._length, chosen))
            found = self._judged(chosen, waves)
            points.append({name: setting} | {key: found[key] for key in kept} | {"real_time_factor": took})
            progress(done, len(settings))
        beside = self._judged(chosen, [self.wave("griffin_lim", i) for i in chosen])
        label = {"evaluations": "network evaluations"}.get(name, name)
        plots = self._plots(label, settings, points, beside, log)
        about = {"recordings": len(chosen), "seconds": sum(map(self._length, chosen))}
        return about | {"points": points, "griffin_lim": {key: beside[key] for key in kept}}, plots

    @staticmethod
    def _plots(
        label: str, settings: Sequence[float], points: Any, beside: Mapping[str, Any], log: bool = False, **more: Any
    ) -> list[str]:
        legend = ("ours", "Griffin-Lim")
        return [
            figures.sweep_plot(panel, label, settings, points, beside[panel.key], log, legend, size=THIRD, **more)
            for panel in PANELS
        ]

"""Vocoders side by side on all held-out recordings: Griffin-Lim, natural speech, and runs at several budgets.

    python benchmarks/vocoders.py RUN [RUN ...] [--steps 1,2,6,50] [--temperature T] [--json FILE]

Measures are those of kuosan.speech.judge, with standard errors over recordings; of the word error rate also the
difference from Griffin-Lim of the same recordings, whose error is smaller. A run's "tuned" row is the table that
`kuosan tune RUN --steps N` made, where there is one. Real-time factors are of the longest recording, on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import jiwer
import torch

import kuosan
from kuosan.progress import Progress
from kuosan.runs import VocoderRun
from kuosan.speech.judge import Recogniser, judge
from kuosan.speech.mel import Mel
from kuosan.speech.words import normalised

MEASURES = ("mel_l1", "log_spectral_distance", "mel_cepstral_distortion", "word_error_rate")


class Bench:
    """The held-out recordings of a run's data, and a table of what is made of them."""

    def __init__(self, run: VocoderRun):
        part, self.analysis = run.data.held_out, run.medium.analysis
        self.natural, self.texts = part.waves, part.texts
        self.recogniser = Recogniser()
        self.rows: list[dict] = []
        self.errors: dict[str, list[tuple[int, int]]] = {}

    def add(self, name: str, waves: list[torch.Tensor], factor: float = math.nan) -> None:
        heard: dict[int, str] = {}

        def hears(wave: torch.Tensor) -> str:
            heard[len(heard)] = self.recogniser(wave)
            return heard[len(heard) - 1]

        quality = asdict(judge(self.natural, waves, self.texts, self.analysis, hears))
        spoken = [text for text in map(normalised, self.texts) if text]
        self.errors[name] = [(_wrong(text, normalised(heard[i])), len(text.split())) for i, text in enumerate(spoken)]
        row = {"name": name, **quality, "real_time_factor": factor}
        if "Griffin-Lim 32" in self.errors:
            row["word_error_rate_from_griffin_lim"] = self._difference(name)
        self.rows.append(row)
        print(self._line(row), flush=True)

    def _difference(self, name: str) -> tuple[float, float]:
        pairs = list(zip(self.errors[name], self.errors["Griffin-Lim 32"], strict=True))
        words = sum(n for (_, n), _ in pairs)
        rate = sum(a - b for (a, _), (b, _) in pairs) / words
        squares = sum((a - b - rate * n) ** 2 for (a, n), (b, _) in pairs)
        return rate, math.sqrt(len(pairs) / (len(pairs) - 1) * squares) / words

    @staticmethod
    def heading() -> str:
        names = ("mel-L1", "LSD, dB", "MCD, dB", "WER", "WER - GL's", "RTF")
        return f"{'':34}" + "".join(f"{name:>16}" for name in names)

    @staticmethod
    def _line(row: dict) -> str:
        cells = [f"{row[m]:.3f} ± {row[f'{m}_error']:.3f}" for m in MEASURES]
        apart = row.get("word_error_rate_from_griffin_lim")
        cells += [f"{apart[0]:+.3f} ± {apart[1]:.3f}" if apart else "", f"{row['real_time_factor']:.3f}"]
        return f"{row['name']:34}" + "".join(f"{cell:>16}" for cell in cells)


def _wrong(text: str, heard: str) -> int:
    aligned = jiwer.process_words(text, heard)
    return aligned.substitutions + aligned.deletions + aligned.insertions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--steps", default="1,2,6,50")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench, done = None, []
    for folder in options.runs:
        run = kuosan.load(folder)
        assert isinstance(run, VocoderRun), f"{folder} is {run.kind}"
        if bench is None:
            bench = Bench(run)
            print(Bench.heading())
            bench.add("natural", bench.natural)
            for n in (1, 32):
                bench.add(f"Griffin-Lim {n}", [run.medium.griffin_lim(wave, n) for wave in bench.natural])
            smooth = [Mel.of(wave, bench.analysis).griffin_lim() for wave in bench.natural]
            bench.add("Griffin-Lim 32, envelope and mel", smooth)
        longest = max(bench.natural, key=len)
        tuned = [int(p.stem.split("-")[1]) for p in (run.folder / "tables").glob("steps-*.json")]
        tries = [(n, {"kind": "auto", "tuned": False}) for n in map(int, options.steps.split(","))]
        for steps, solver in [*tries, *((n, {"kind": "tuned"}) for n in sorted(tuned))]:
            how = {"steps": steps, "solver": solver}
            if options.temperature is not None:
                how["temperature"] = options.temperature
            waves = run.sample(input=bench.natural, progress=Progress("waves"), **how)
            sampler = run.sampler(**how)
            factor = run.timed(sampler, [("", longest)], [longest])["real_time_factor"]
            what = "tuned" if solver["kind"] == "tuned" else "auto"
            bench.add(f"{run.folder.name}, {steps} {what}", waves, factor)
        done.append({"run": str(run.folder), "step": run.step, "seconds": run.seconds})
    assert bench is not None
    if options.json:
        options.json.write_text(json.dumps({"runs": done, "rows": bench.rows}, indent=1))


if __name__ == "__main__":
    main()

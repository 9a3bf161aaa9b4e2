"""What a report measures of words as points: what of any model of texts, and how well words are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kuosan.discrete import Drawn
from kuosan.discrete.embedding import rounding_accuracy
from kuosan.measurements.text import MOST_TOKENS, TWICE, TextMeasurements, rows_of_way
from kuosan.prediction import Prediction
from kuosan.runs import EmbeddingRun
from kuosan.runs.embedding import WordSampler
from kuosan.solvers import Noise
from kuosan.solvers.executor import run as execute

#: Held-out texts whose words are rounded.
ROUNDED = 500


class EmbeddingMeasurements(TextMeasurements):
    """Of Diffusion-LM: also its way from noise, and whether its points are told apart."""

    run: EmbeddingRun  # type: ignore[assignment]
    sections = (
        "facts",
        "samples",
        "way",
        "loss",
        "nats_per_text",
        "control",
        "points",
        "lengths",
        "neighbours",
    )
    shares: ClassVar[Mapping[str, float]] = {"samples": 0.3, "bound": 0.3, "control": 0.4}
    nuclei = (1.0,)
    exact = False

    @property
    def model_in_words(self) -> dict[str, str]:
        recipe = self.run.recipe
        assert recipe.embedding is not None
        points = {"points": f"{recipe.embedding.size} dimensions", "predicts": recipe.denoiser.predicts}
        return super().model_in_words | points

    def one_evaluation(self, samples: int) -> None:
        self._draw(self.run.sampler(solver={"kind": "ddim"}, steps=1, guidance=0.0), samples)

    def price(self, sampler: WordSampler) -> float:  # type: ignore[override]
        return sampler.how["evaluations"] * (TWICE if sampler.how["guidance"] else 1)

    def _draw(self, sampler: WordSampler, n: int, progress: Any = None) -> Drawn:  # type: ignore[override]
        tokens: list[Tensor] = []
        for batch in self.run.batches(sampler, range(n), self.run.labels_for(n)):
            tokens.append(batch)
            if progress is not None:
                progress(sum(map(len, tokens)), n)
        evaluations = sampler.how["evaluations"]
        return Drawn(torch.cat(tokens), torch.full((n,), evaluations), evaluations)

    def way_of_sampling(self) -> dict[str, Any]:
        how = self.run.sampler().how
        named = {"solver": how["solver"].partition("(")[0].lower(), "guidance": how["guidance"]}
        return named | {"steps": None, "evaluations": float(how["evaluations"]), "temperature": 1.0, "nucleus": 1.0}

    def way(self) -> tuple[dict[str, Any], list[int]]:
        """The words nearest to x_0-hat at each evaluation of one sample: seed 0, which `kuosan sample` draws first."""
        run, sampler = self.run, self.run.sampler()
        seen: list[Tensor] = []

        def watch(i: int, x: Tensor, prediction: Prediction) -> None:
            seen.append(run.denoiser.embedding.nearest(prediction.x0)[0].cpu())

        embedding, labels = run.denoiser.embedding, run.labels_for(1)
        n = int(sampler.lengths([0], labels))
        noise, condition = (
            Noise([0], (n, embedding.size)),
            None if labels is None else labels.to(embedding.weight.device),
        )
        start = sampler.model.process.prior(sampler.table.times[0]).std.float()
        with torch.no_grad():
            end = execute(
                sampler.table,
                sampler.of_length(n),
                (start * noise.draw()).to(embedding.weight.device),
                noise.draw,
                condition,
                transform=sampler.transform,
                watch=watch,
            )
        text = embedding.nearest(end)[0].cpu()
        seen.append(text)
        rows, widths = rows_of_way(run.medium, seen, n, seen[0])
        return {
            "seed": 0,
            "class": None if labels is None or not run.classes else run.classes[int(labels[0])],
            "masked": False,
            "steps": len(seen) - 1,
            "evaluations": sampler.how["evaluations"],
            "tokens": n,
            "left_to_right": n + (n < run.shape[0]),
            "text": run.medium.words(text),
            "most_tokens": MOST_TOKENS,
            "rows": rows,
        }, widths

    def points(self) -> tuple[dict[str, Any], None]:
        """Whether the nearest word is the right one at the last noisy time, and how near two words are."""
        run, table = self.run, self.run.sampler().table
        tokens, condition = run.examples("held_out", ROUNDED)
        return {
            "rounded": rounding_accuracy(run.denoiser, tokens, table.times[-1], condition),
            "texts": len(tokens),
            "log_snr": float(run.denoiser.process.log_snr(table.times[-1])),
            "smallest": run.denoiser.embedding.smallest_distance(),
            "apart": (2 * run.denoiser.embedding.size) ** 0.5,
        }, None

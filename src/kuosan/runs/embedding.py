"""The run of a diffusion model of words as points: a diffusion run whose data are texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kuosan.bound import Likelihood
from kuosan.chain import Chain
from kuosan.discrete.embedding import Clamp, EmbeddingChain, EmbeddingDenoiser
from kuosan.discrete.lengths import PAD
from kuosan.process import Grid
from kuosan.runs.diffusion import DiffusionRun
from kuosan.runs.run import RunError, device
from kuosan.sampler import Sampler
from kuosan.text.medium import TextMedium
from kuosan.variance import Choice


@dataclass(frozen=True)
class WordSampler(Sampler):
    """A sampler of texts, of which some tokens and the length may be given.

    Args:
        known: (L,) int64, tokens that are given, -1 where one is drawn.
        length: of each text, in tokens; None: where the first padding is drawn.
    """

    known: Tensor | None = None
    length: int | None = None


class EmbeddingRun(DiffusionRun):
    """A trained (or half-trained) diffusion model of texts as points (Diffusion-LM)."""

    families = ("embedding",)
    medium: TextMedium

    @property
    def denoiser(self) -> EmbeddingDenoiser:
        """The model with its averaged weights, ready to use."""
        return self.model

    @property
    def state_shape(self) -> tuple[int, ...]:
        assert self.recipe.embedding is not None
        return (*self.shape, self.recipe.embedding.size)

    def states(self, part: Any) -> Tensor:
        return self.denoiser.embedding(part.tokens)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sampler(
        self, *, prompt: str | None = None, infill: str | None = None, length: int | None = None, **settings: Any
    ) -> WordSampler:
        """The model, table and all else that sampling takes; what is not given is the recipe's.

        Args:
            prompt, infill, length: of :meth:`kuosan.text.medium.TextMedium.given`. The vectors of given words, and of
                the padding after the asked length, are held at every noise level, as parts of a picture are.
            settings: of :meth:`kuosan.runs.DiffusionRun.sampler`; clip replaces every x0-hat by the nearest word.

        Raises:
            ValueError: an unknown setting or an impossible value.
        """
        known, length = self.medium.given(prompt, infill, length)
        asked = {key: v for key, v in (("prompt", prompt), ("infill", infill), ("length", length)) if v is not None}
        if settings.get("threshold"):
            raise RunError(f"{self.folder} is of words: it has no threshold to choose")
        if settings.get("known") is not None or settings.get("mask") is not None:
            raise RunError(f"{self.folder} is of words: give a prompt, or a text to fill in, in the place of a picture")
        held = torch.full(self.shape, -1) if known is None else known.clone()
        if length is not None:
            held[length:] = PAD
        embedding = self.denoiser.embedding
        if bool((held >= 0).any()):
            with torch.no_grad():
                settings["known"] = embedding(held.clamp_min(0)[None].to(device()))[0].cpu()
            settings["mask"] = (held >= 0)[:, None].expand(self.state_shape)
        found = super().sampler(**settings)
        clamped = self._settings(settings).section.clip
        for name in ("known", "mask"):
            found.how.pop(name, None)
        return WordSampler(
            found.model,
            found.table,
            Clamp(embedding) if clamped else None,
            found.corrector,
            found.how | asked,
            known,
            length,
        )

    def kept(self, x: Tensor, sampler: Sampler) -> Tensor:
        """The nearest words; of an asked length none of them padding, and nothing after the first padding."""
        assert isinstance(sampler, WordSampler)
        return self._words(self.denoiser, x, sampler)

    def _words(self, model: EmbeddingDenoiser, x: Tensor, sampler: WordSampler | None = None) -> Tensor:
        x = x.to(device())
        words = model.embedding.nearest(x).cpu()
        if sampler is not None and sampler.length is not None:
            padded = words == PAD
            padded[:, sampler.length :] = False
            if bool(padded.any()):
                products = model.embedding.products(x[padded.to(x.device)]).detach()
                products[:, PAD] = -torch.inf
                words[padded] = products.argmax(-1).cpu()
        if sampler is not None and sampler.known is not None:
            words = torch.where(sampler.known >= 0, sampler.known, words)
        return words.masked_fill((words == PAD).cumsum(1) > 0, PAD)

    def draw_while_training(self, model: EmbeddingDenoiser, seeds: Sequence[int]) -> Tensor:  # type: ignore[override]
        return self._words(model, super().draw_while_training(model, seeds))

    # -- measuring ----------------------------------------------------------------------------------------------------

    def examples(self, split: str = "held_out", most: int | None = None) -> tuple[Tensor, Tensor | None]:
        x, condition = super().examples(split, most)
        return pad(x, (0, self.shape[0] - x.shape[1]), value=PAD), condition

    def chain(  # type: ignore[override]
        self,
        *,
        variance: Choice | None = None,
        steps: int | None = None,
        grid: Grid | None = None,
        **settings: Any,
    ) -> tuple[Chain, dict[str, Any]]:
        """The ladder over words: in continuous time, or of K steps.

        Args:
            variance: of the reverse steps; default the recipe's.
            steps: K; or ``grid``. Default: continuous time.
        """
        refused = [name for name, value in settings.items() if value]
        if refused:
            raise RunError(f"{self.folder} is of words: its chain has no {', '.join(refused)} to choose")
        choice = self.recipe.evaluation.variance if variance is None else variance
        continuous = steps is None and grid is None
        count = self.recipe.evaluation.bound_steps if continuous else steps
        how: dict[str, Any] = {"steps": count} if grid is None else {"grid": grid}
        form = "continuous" if continuous else "matching"
        chain = EmbeddingChain(self.denoiser, variance=self.variance(choice), form=form, **how)
        said = {"form": "continuous time"} if continuous else {"steps": chain.length, "form": f"{chain.length} steps"}
        return chain, said

    def elbo_settings(self, chain: Chain) -> dict[str, Any]:
        section = self.recipe.evaluation
        assert isinstance(chain, EmbeddingChain)
        return {"estimator": chain.form, "terms": section.terms, "draws": section.draws, "batch_size": 256}

    def by_ode(self, x: Tensor, condition: Tensor | None, draws: int = 2, **settings: Any) -> Likelihood:
        raise RunError(f"{self.folder} is of words: the density that the ODE gives of their points is no probability")

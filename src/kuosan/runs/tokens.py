"""Runs of models of tokens: masked and uniform diffusion, and the autoregressive model beside them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import pad

from kuosan.build import make_rule
from kuosan.chain import Chain
from kuosan.discrete import (
    CategoricalChain,
    CategoricalDenoiser,
    Drawn,
    Sharpened,
    TokenGuidance,
    TokenRule,
    expected_evaluations,
    sample_tokens,
)
from kuosan.discrete.autoregressive import (
    Autoregressive,
    AutoregressiveChain,
    AutoregressiveGuidance,
    sample_left_to_right,
)
from kuosan.discrete.blocks import blocks_of, sample_blocks
from kuosan.discrete.risk import candidate_batches, of_least_risk, with_candidates
from kuosan.discrete.rules import Ancestral, Euler
from kuosan.recipe import RecipeError, Sampling, explain
from kuosan.runs.run import Run, RunError, device
from kuosan.text.medium import TextMedium


@dataclass(frozen=True)
class TokenSampler:
    """A model of tokens made ready to be sampled in one way.

    Args:
        model: guided, if it is.
        section: the recipe's settings, with what was asked for in their place.
        rule: of each step, of diffusion.
        known: (L,) int64, the tokens that are given, -1 where one is drawn.
        length: how many tokens each text has; None: it is drawn.
        how: the same in words and numbers.
        blocks: of how many tokens the texts are written, if they are longer than the model's own.
        candidates: how many texts are drawn for each, of which the one of least risk is taken.
    """

    model: Any
    section: Sampling
    rule: TokenRule | None
    known: Tensor | None
    length: int | None
    how: dict[str, Any]
    blocks: int | None = None
    candidates: int = 1

    @property
    def transform(self) -> Sharpened | None:
        """Of each token's law."""
        sharpened = Sharpened(self.section.temperature, self.section.nucleus)
        return None if sharpened == Sharpened() else sharpened


class TokenRun(Run):
    """A trained (or half-trained) model of texts as tokens."""

    medium: TextMedium
    #: Settings of sampling that it knows.
    choices: ClassVar[frozenset[str]] = frozenset({"guidance", "temperature", "nucleus"})
    #: Whether it writes texts longer than those that it was trained on, block after block.
    in_blocks = False

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sampler(
        self,
        *,
        prompt: str | None = None,
        infill: str | None = None,
        length: int | None = None,
        blocks: int | None = None,
        candidates: int | None = None,
        **settings: Any,
    ) -> TokenSampler:
        """The model with all else that sampling takes; what is not given is the recipe's.

        Args:
            prompt: how each text begins.
            infill: a text with "_" for each token that is to be drawn; it has just as many tokens, or ``length``.
            length: how many tokens each text has; default: drawn from the model's law of lengths.
            blocks: of how many tokens a text of a ``length`` beyond the model's own is written, each block given what
                stands before it: :func:`kuosan.discrete.blocks.sample_blocks`.
            candidates: how many texts are drawn for each, of which the one most like the others is taken:
                :func:`kuosan.discrete.minimum_risk`.
            settings: keys of the recipe's section ``sampling`` that are of tokens: guidance, temperature, nucleus,
                and of diffusion solver and steps.

        Raises:
            ValueError: an unknown setting or an impossible value; words that are not in the vocabulary; a prompt, a
                text to fill in or a length that the model has no room for; blocks of a length that needs none.
        """
        found = self._sampler(self.model, settings, prompt, infill, length, blocks)
        return found if candidates is None else replace(found, **with_candidates(candidates, found.how))

    def _sampler(
        self,
        model: Any,
        settings: dict[str, Any],
        prompt: str | None = None,
        infill: str | None = None,
        length: int | None = None,
        blocks: int | None = None,
    ) -> TokenSampler:
        given = {key: value for key, value in settings.items() if value is not None}
        if others := sorted(given.keys() - self.choices):
            raise RunError(f"{self.folder} is {self.kind}: it has no {', '.join(others)} to choose")
        try:
            section = Sampling.model_validate(self.recipe.sampling.model_dump() | given)
        except ValidationError as error:
            raise RecipeError(explain(error, "sampling")) from None
        if section.guidance and not self.conditional:
            raise RunError(f"{self.folder} was trained without classes: there is nothing to guide towards")
        known, length = self._given(prompt, infill, length, blocks)
        how: dict[str, Any] = {"guidance": section.guidance}
        how |= {key: value for key in ("temperature", "nucleus") if (value := getattr(section, key)) != 1}
        asked = {"prompt": prompt, "infill": infill, "length": length, "blocks": blocks}
        how |= {key: value for key, value in asked.items() if value is not None}
        drawn = self.shape[0] if length is None else length
        passes = [drawn] if length is None or blocks is None else blocks_of(length, self.shape[0], blocks)
        guided, rule, own_way = self._way(model, section, passes)
        return TokenSampler(guided, section, rule, known, length, own_way | how, blocks)

    def _given(
        self, prompt: str | None, infill: str | None, length: int | None, blocks: int | None
    ) -> tuple[Tensor | None, int | None]:
        """As :meth:`TextMedium.given`; in blocks a text may be longer: what is given stands in its first window."""
        longest = self.shape[0]
        if blocks is None:
            if self.in_blocks and length is not None and length > longest:
                raise RunError(
                    f"length must lie in 1 to {longest}, the longest text of this model, unless it is written in "
                    f"blocks (--blocks {max(1, longest // 2)}); got {length}"
                )
            return self.medium.given(prompt, infill, length)
        if not self.in_blocks:
            raise RunError(f"{self.folder} is {self.kind}: it writes token by token, and has no blocks to choose")
        if length is None or length <= longest:
            asked = "none was given" if length is None else f"got {length}"
            raise RunError(
                f"blocks are for a length beyond the {longest} tokens that this model writes at once; {asked}"
            )
        known, _ = self.medium.given(prompt, infill, None)
        return None if known is None else pad(known, (0, length - longest), value=-1), length

    @abstractmethod
    def _way(
        self, model: Any, section: Sampling, passes: Sequence[int]
    ) -> tuple[Any, TokenRule | None, dict[str, Any]]:
        """The guided model, its rule, and in words how it is drawn from: solver and evaluations.

        Args:
            passes: how many tokens each of them writes, one after the other.
        """

    @abstractmethod
    def _draw(self, sampler: TokenSampler, seeds: Sequence[int], labels: Tensor | None, **how: Any) -> Drawn: ...

    def batches(
        self, sampler: TokenSampler, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int | None = None
    ) -> Iterator[Tensor]:
        labels = self.labels_for(len(seeds)) if labels is None else labels
        n = sampler.candidates
        for part, own in candidate_batches(seeds, labels, n, self.together(batch_size)):
            yield of_least_risk(self._draw(sampler, part, own).tokens, n)

    def draw(self, sampler: TokenSampler, seeds: Sequence[int], labels: Tensor | None = None, **how: Any) -> Drawn:
        """Samples with what they cost.

        Args:
            how: watch, cache (of diffusion), batch_size, progress: of :func:`kuosan.discrete.sample_tokens`.
        """
        return self._draw(sampler, seeds, self.labels_for(len(seeds)) if labels is None else labels, **how)

    def check(self, model: Any) -> None:
        self._sampler(model, {})

    def draw_while_training(self, model: Any, seeds: Sequence[int]) -> Tensor:
        sampler = self._sampler(model, {})
        return self._draw(sampler, list(seeds), self.labels_for(len(seeds))).tokens


class DiscreteRun(TokenRun):
    """Categorical diffusion: under masks, or uniform noise."""

    families = ("tokens",)
    choices = TokenRun.choices | {"solver", "steps"}
    in_blocks = True

    @property
    def denoiser(self) -> CategoricalDenoiser:
        """The model with its averaged weights, ready to use."""
        return self.model.model.denoiser

    def _way(
        self, model: CategoricalChain, section: Sampling, passes: Sequence[int]
    ) -> tuple[Any, TokenRule, dict[str, Any]]:
        denoiser, rule = model.model.denoiser, make_rule(section.solver)
        if rule.needs_mask and denoiser.process.mask is None:
            raise RunError(
                f"sampling.solver: {section.solver['kind']} needs masks, and the noise of this model has none"
            )
        cached = denoiser.process.mask is not None and isinstance(rule, Ancestral | Euler)
        evaluations = sum(expected_evaluations(n, section.steps) if cached else section.steps for n in passes)
        how = {"solver": str(rule), "steps": section.steps, "evaluations": round(evaluations, 1)}
        guided = TokenGuidance(denoiser, section.guidance) if section.guidance else denoiser
        return guided, rule, how

    def _draw(self, sampler: TokenSampler, seeds: Sequence[int], labels: Tensor | None, **how: Any) -> Drawn:
        length, window = sampler.length, self.shape[0]
        how |= {
            "seeds": seeds,
            "steps": sampler.section.steps,
            "rule": sampler.rule,
            "condition": labels,
            "transform": sampler.transform,
            "known": sampler.known,
            "device": device(),
        }
        if length is not None and sampler.blocks is not None:
            return sample_blocks(sampler.model, length, window=window, block=sampler.blocks, **how)
        lengths = None if length is None else torch.full((len(seeds),), length)
        return sample_tokens(sampler.model, window, lengths=lengths, **how)

    def chain(self, *, steps: int | None = None, **settings: Any) -> tuple[Chain, dict[str, Any]]:
        """The model as a ladder: in continuous time, or on an even grid.

        Args:
            steps: K, of the grid; default: continuous time.
        """
        refused = [name for name, value in settings.items() if value]
        if refused:
            raise RunError(f"{self.folder} is {self.kind}: its chain has no {', '.join(refused)} to choose")
        if steps is None:
            return self.model, {"form": "continuous time"}
        chain = CategoricalChain(self.denoiser, steps=steps)
        return chain, {"steps": steps, "form": f"{steps} steps"}

    def likelihoods(self, x: Tensor, condition: Tensor | None, measures: Sequence[str], **how: Any) -> Any:
        if "importance" in measures and how.get("steps") is None:
            raise RunError("paths are of a ladder of so many steps: --importance needs --bound-steps K, such as 100")
        return super().likelihoods(x, condition, measures, **how)

    def elbo_settings(self, chain: Chain) -> dict[str, Any]:
        form = "continuous" if chain is self.model else "matching"
        return {"estimator": form, "terms": "all", "draws": self.recipe.evaluation.draws, "batch_size": 256}


class AutoregressiveRun(TokenRun):
    """A model that writes from left to right."""

    families = ("autoregressive",)

    def _way(
        self, model: AutoregressiveChain, section: Sampling, passes: Sequence[int]
    ) -> tuple[Any, None, dict[str, Any]]:
        if section.solver.get("kind") != "auto":
            raise RunError(f"sampling.solver: {self.kind} writes from left to right: drop it")
        own: Autoregressive = model.model.autoregressive
        guided = AutoregressiveGuidance(own, section.guidance) if section.guidance else own
        return guided, None, {"solver": "left to right", "evaluations": self.shape[0]}

    def _draw(self, sampler: TokenSampler, seeds: Sequence[int], labels: Tensor | None, **how: Any) -> Drawn:
        if sampler.length is not None:
            raise RunError(f"{self.folder} is {self.kind}: it takes a prompt, but no length and nothing to fill in")
        prompt = None if sampler.known is None else sampler.known[sampler.known >= 0]
        return sample_left_to_right(
            sampler.model,
            self.shape[0],
            seeds=seeds,
            condition=labels,
            transform=sampler.transform,
            prompt=prompt,
            device=device(),
            **how,
        )

    def chain(self, **settings: Any) -> tuple[Chain, dict[str, Any]]:
        refused = [name for name, value in settings.items() if value]
        if refused:
            raise RunError(f"{self.folder} is {self.kind}: its chain has no {', '.join(refused)} to choose")
        return self.model, {"form": "log p itself"}

    def elbo_settings(self, chain: Chain) -> dict[str, Any]:
        return {"estimator": "path", "analytic": True, "terms": "shared", "draws": 1, "batch_size": 256}

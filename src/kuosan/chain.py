"""One bound for the whole ladder of latents: q goes up, p comes down, and log p(x) >= E[log p(x, z) - log q(z|x)].

A VAE is a ladder of one rung, a hierarchical VAE one of T, a diffusion model one of T whose q is fixed. x is z_0; rung
i is the latent z_i; its neighbours are ``below`` (z_{i-1}, ..., x) and ``above`` (z_{i+1}, ..., z_T), nearest first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kuosan.bound import Bound, Likelihood, Tally, error_of_mean
from kuosan.denoiser import evaluating
from kuosan.gaussian import Gaussian, per_example
from kuosan.kernels import Generative, Guide, Path, Place, Rung, check_shapes, log_prob_of, name_of, negative_entropy
from kuosan.seeds import stream
from kuosan.visits import TERMS, Pilot, Visits, plan, shares_of


class Chain(nn.Module):
    r"""A ladder of latents and every form of its bound.

    .. math:: \log p(x) \ge \mathbb E_{q(z_{1:T}|x)}\Big[\log p(x|z_1) + \log\frac{p(z_T)}{q(z_T|\cdot)}
        + \sum_{i=1}^{T-1} \log\frac{p(z_i|z_{i+1})}{q(z_i|\cdot)}\Big]

    The dot is z_{i-1} for a q that goes up and (z_{i+1}, x) for one that comes down: the same joint law, and two forms
    of the same bound.

    Args:
        guide: q.
        model: p.

    Raises:
        ValueError: they are of different lengths.
    """

    def __init__(self, guide: Guide, model: Generative):
        super().__init__()
        if guide.length != model.length or guide.length < 1:
            raise ValueError(f"q has {guide.length} rungs and p has {model.length}: they must be as many, at least one")
        self.guide, self.model = guide, model

    @property
    def length(self) -> int:
        """T, the number of latents."""
        return self.guide.length

    @property
    def times(self) -> Tensor:
        """(T,): the rungs' places in (0, 1], increasing."""
        return torch.arange(1, self.length + 1, dtype=torch.float64) / self.length

    # -- drawing latents ----------------------------------------------------------------------------------------------

    def path(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        generator: torch.Generator | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> Path:
        """All latents of each example, drawn together: from the bottom up, or from the top if q only comes down.

        Args:
            noise: standard-normal values of z_1, ..., z_T, if all laws are Gaussian; default: drawn from ``generator``.
        """
        length, rises = self.length, self.guide.knows("up")
        given = self.guide.read(x, condition)
        z: list[Any] = [x, *[None] * length]
        laws: list[Any] = [None] * (length + 1)
        for i in range(1, length + 1) if rises else range(length, 0, -1):
            if rises:
                laws[i] = self._up(i, tuple(reversed(z[:i])), given)
            else:
                laws[i] = self._posterior(i, tuple(z[i + 1 :]), given, x)
            z[i] = laws[i].sample(generator=generator) if noise is None else laws[i].sample(noise[i - 1])
        return Path(z, laws, given, condition)

    def _place(self, i: Rung, x: Tensor, condition: Any, between: bool, generator: torch.Generator) -> Place:
        """Latents drawn for this rung alone: what is above it; ``between``, the rung itself and what is below too."""
        guide = self.guide
        alone = guide.knows("marginal") and self.model.markov and (guide.knows("up") or not between)
        if not alone:
            assert isinstance(i, int), "the rungs of a path are visited one by one"
            return self.path(x, condition, generator=generator).at(i)
        given = guide.read(x, condition)
        top, bottom = (isinstance(i, int) and i == end for end in (self.length, 0))
        if bottom or not between:
            above = () if top else (guide.marginal(i + 1, given).sample(generator=generator),)
            return Place(given, condition, x, above)
        below = guide.marginal(i - 1, given).sample(generator=generator)
        law = self._up(i, (below,), given)
        z = law.sample(generator=generator)
        above = () if top else (self._up(i + 1, (z,), given).sample(generator=generator),)
        return Place(given, condition, x, above, (below,), z, law)

    def generate(self, noise: Tensor, condition: Any = None, top: Tensor | None = None) -> Path:
        """Draws from p, from the top down to x.

        Args:
            noise: (B, n), standard-normal: of z_T, ..., z_1 and x in this order, n their coordinates in all.
            top: z_T, if it is drawn in another way; the noise is then of the others.
        """
        model, length = self.model, self.length
        start = length if top is None else length - 1
        parts = noise.split([math.prod(shape) for shape in reversed(model.shapes[: start + 1])], dim=1)
        z: list[Any] = [None] * (length + 1)
        laws: list[Any] = [None] * (length + 1)
        z[length] = top
        for i, part in zip(range(start, -1, -1), parts, strict=True):
            laws[i] = self._p(i, tuple(z[i + 1 :]), condition)
            z[i] = laws[i].sample(part.unflatten(1, model.shapes[i]))
        return Path(z, laws, None, condition)

    # -- kernels ------------------------------------------------------------------------------------------------------

    def _up(self, i: Rung, below: tuple[Tensor, ...], given: Any) -> Any:
        return self._call("q, going up", self.guide.up, i, below, given)

    def _posterior(self, i: Rung, above: tuple[Tensor, ...], given: Any, x: Tensor) -> Any:
        if self.length == 1 and not self.guide.knows("posterior"):
            return self._up(i, (x,), given)
        return self._call("q, coming down", self.guide.posterior, i, above, given)

    def _p(self, i: Rung, above: tuple[Tensor, ...], condition: Any) -> Any:
        if not above:
            return self.model.prior(condition)
        return self._call("p", self.model.down, i, above, condition)

    @staticmethod
    def _call(what: str, kernel: Callable, i: Rung, parents: tuple[Tensor, ...], given: Any) -> Any:
        try:
            return kernel(i, parents, given)
        except RuntimeError as error:  # which of many layers a matrix did not fit is in the message, which rung is not
            shapes = ", ".join(str(tuple(z.shape[1:])) for z in parents)
            error.add_note(f"in the kernel of {what}, at {name_of(i)}, given latents of shape {shapes}")
            raise

    # -- the terms ----------------------------------------------------------------------------------------------------

    def decoding(self, x: Tensor, above: tuple[Tensor, ...], condition: Any = None) -> Tensor:
        """-log p(x | z_1, ...), (B,): the term of rung 0 in every form."""
        return -log_prob_of(0, self._p(0, above, condition), x)

    def divergence(
        self,
        i: Rung,
        q: Any,
        above: tuple[Tensor, ...],
        condition: Any = None,
        *,
        z: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """KL(q || p(z_i | above)), (B,): in closed form of two laws of a kind that knows one, otherwise of a draw, z.

        A prior that is itself a chain is known by its bound, of which one estimate is taken.
        """
        p: Any = self._p(i, above, condition)
        if type(p) is type(q) and hasattr(q, "kl"):
            check_shapes(i, q.shape, p.shape)
            return per_example(q.kl(p))
        z = q.sample(generator=generator) if z is None else z
        return negative_entropy(i, q, z) - self._log_p(i, p, z, condition, generator)

    def _log_p(self, i: Rung, p: Any, z: Tensor, condition: Any, generator: torch.Generator | None) -> Tensor:
        if isinstance(p, Chain):
            return p.estimate(z, condition, generator=generator)
        return log_prob_of(i, p, z)

    def _consistency(self, i: Rung, place: Place, printed: bool, generator: torch.Generator | None) -> Tensor:
        up = self._up(i, place.below, place.given)
        if printed or not place.above:
            return self.divergence(i, up, place.above, place.condition, generator=generator)
        bridge = self.guide.bridge(i, place.below, place.above, place.given)
        p = self._p(i, place.above, place.condition)
        if not isinstance(up, Gaussian) or not isinstance(p, Gaussian):
            raise ValueError(f"{name_of(i)}: the bridge form needs Gaussian kernels; use estimator='path'")
        check_shapes(i, up.shape, p.shape)
        return per_example(bridge.cross_entropy(p) - bridge.cross_entropy(up))

    def term(
        self,
        estimator: str,
        i: Rung,
        place: Place,
        analytic: frozenset[int] = frozenset(),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What rung i takes from the bound, given what was drawn around it, (B,)."""
        if isinstance(i, int) and i == 0:
            return self.decoding(place.x, place.above, place.condition)
        if estimator == "matching":
            falls = place.law is not None and not self.guide.knows("up")
            q = place.law if falls else self._posterior(i, place.above, place.given, place.x)
            z = place.z if falls else None
            return self.divergence(i, q, place.above, place.condition, z=z, generator=generator)
        if estimator != "path":
            return self._consistency(i, place, estimator == "consistency_as_printed", generator)
        assert place.z is not None
        if isinstance(i, int) and i in analytic:
            return self.divergence(i, place.law, place.above, place.condition, z=place.z, generator=generator)
        p = self._p(i, place.above, place.condition)
        return log_prob_of(i, place.law, place.z) - self._log_p(i, p, place.z, place.condition, generator)

    # -- what may be asked --------------------------------------------------------------------------------------------

    #: The forms of the bound that this chain may have.
    estimators: tuple[str, ...] = ("matching", "path", "bridge", "consistency_as_printed")

    def _check(self, estimator: str, analytic: bool | Iterable[int]) -> frozenset[int]:
        """The rungs whose KL is taken in closed form along a path."""
        guide, length = self.guide, self.length
        if estimator not in self.estimators:
            raise ValueError(f"estimator must be one of {', '.join(self.estimators)}, got {estimator!r}")
        falls = guide.knows("posterior") or length == 1
        if estimator == "matching" and not falls:
            raise ValueError(
                "the matching form integrates each z_i under q(z_i | z_{i+1}, x), and this q is only known going up, "
                "q(z_i | z_{i-1}): use estimator='path'"
            )
        if estimator in ("bridge", "consistency_as_printed"):
            missing = [k for k in ("up", *(["bridge"] if estimator == "bridge" else [])) if not guide.knows(k)]
            if missing:
                raise ValueError(f"the form {estimator!r} needs q's kernel {missing[0]!r}, which this q does not know")
            if not self.model.markov:
                raise ValueError(f"the form {estimator!r} is one of Markov chains; this p has skip connections")
        if estimator == "consistency_as_printed":
            warnings.warn(
                "the consistency form as printed integrates z_i under q(z_i | z_{i-1}) alone, as if z_{i+1} did not "
                "depend on it: it is not a bound on log p(x) (docs/theory, erratum 3). 'bridge' is the valid one",
                stacklevel=3,
            )
        if analytic is False:
            return frozenset()
        if estimator != "path":
            raise ValueError("analytic= belongs to estimator='path'; the other forms are in closed form already")
        valid = frozenset({length} if guide.knows("up") else range(1, length + 1))
        if analytic is True:
            return valid
        asked = frozenset(analytic)
        for i in sorted(asked - valid):
            if not 1 <= i <= length:
                raise ValueError(f"analytic names rung {i}; the rungs are 1 to {length}")
            raise ValueError(
                f"the KL of rung {i} has no closed form along a path: z_{i + 1}, which p(z_{i} | z_{i + 1}) is given, "
                f"was itself drawn from z_{i}, so that z_{i} cannot be integrated on its own (docs/theory, erratum 3). "
                f"It is valid for rungs {', '.join(map(str, sorted(valid)))}"
            )
        return asked

    # -- the bound ----------------------------------------------------------------------------------------------------

    def costs(
        self,
        path: Path,
        generator: torch.Generator | None = None,
        log_prior: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """What each rung, 0 to T, takes from the bound along a path, (B,) each; a KL in closed form if it has one.

        Args:
            log_prior: estimates log p(z_T), (B,), in the place of p's own prior.
        """
        analytic, last = self._check("path", True), self.length
        costs = [self.term("path", i, path.at(i), analytic, generator) for i in range(last)]
        if log_prior is None:
            return [*costs, self.term("path", last, path.at(last), analytic, generator)]
        z = path.z[last]
        return [*costs, negative_entropy(last, path.laws[last], z) - log_prior(z)]

    def estimate(self, x: Tensor, condition: Any = None, *, generator: torch.Generator | None = None) -> Tensor:
        """One unbiased estimate of the bound, (B,), nats, through which gradients pass: what training maximises.

        All rungs along one path, with every KL in closed form that has one.
        """
        return -torch.stack(self.costs(self.path(x, condition, generator=generator), generator)).sum(0)

    @torch.no_grad()
    def elbo(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        *,
        estimator: str = "matching",
        terms: str | None = None,
        analytic: bool | Iterable[int] = False,
        draws: int = 1,
        seed: int = 0,
        batch_size: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> Bound:
        r"""The evidence lower bound on log p(x), term by term, in nats.

        Args:
            x: (B, ...), on its levels if p(x|z) is discrete.
            condition: (B, ...) or None.
            estimator: which form of the bound, all equal in expectation but the last.
                "matching": reconstruction - KL(q(z_T|x) || p(z_T)) - sum of KL(q(z_i|z_{i+1},x) || p(z_i|z_{i+1})),
                needs q going down (of diffusion models: Ho et al. 2020, arXiv 2006.11239, eq. 5).
                "path": log p(x, z) - log q(z|x) of the latents that were drawn; for every chain.
                "bridge": the consistency form, z_i integrated under q(z_i | z_{i-1}, z_{i+1}); for Markov q's.
                "consistency_as_printed": that form with z_i integrated under q(z_i | z_{i-1}) alone. It is not a bound
                (docs/theory, erratum 3): it is here to be shown, and warns.
            terms: "all" evaluates every rung, each with latents drawn for it alone; "shared" all of them along one
                path; "random" the two ends and one rung between for each example and draw, "stratified" the same with
                the rungs of all examples and draws spread evenly, "importance" the same, more often where the terms
                are large, found by a pilot of a few hundred evaluations, the decoder's among them. All are unbiased.
                Default: "all" where q is known at every rung, otherwise "shared".
            analytic: along a path, the rungs whose KL is taken in closed form; True: all those where that is valid.
            draws: how many times each is repeated.
            seed: of all that is drawn.
            batch_size: terms evaluated at once.
            progress: called with (done, all) terms.

        Raises:
            ValueError: an unknown choice, a form that this chain does not have, kernels that do not fit (which rung,
                which shapes), data off the levels or not finite.
        """
        rungs = self._check(estimator, analytic)
        terms = terms or ("all" if self.guide.knows("marginal") else "shared")
        _check_elbo(x, condition, terms, draws, batch_size)
        generator = stream("bound", seed)
        tally = Tally(self.length + 1, len(x), shares_of(draws))
        extra = 0
        with evaluating(self):
            if terms == "shared":
                self._along_paths(tally, estimator, rungs, x, condition, draws, batch_size, generator, progress)
            else:
                extra = self._rung_by_rung(
                    tally, estimator, rungs, x, condition, terms, draws, batch_size, generator, progress
                )
        between = self.length - 1
        # the decoder and the rungs between; of the importance-sampled all together one
        each = 1 + (between if terms in ("all", "shared") else 0 if terms == "importance" else min(1, between))
        nested = 2 if isinstance(self.model.prior(), Chain) else 0  # an estimate of a prior's own bound
        evaluations = draws * (each + nested) + extra / len(x)
        return tally.bound(self.times, x[0].numel(), evaluations, self.model.discrete)

    def _along_paths(self, tally, estimator, analytic, x, condition, draws, batch_size, generator, progress) -> None:
        share = torch.arange(len(tally.shares)).repeat_interleave(tally.shares)
        done = 0
        for replicate in share.tolist():
            for rows in torch.arange(len(x)).split(max(1, min(batch_size, MOST_HELD // (self.length * x[0].numel())))):
                path = self.path(x[rows], None if condition is None else condition[rows], generator=generator)
                for i in range(self.length + 1):
                    value = self.term(estimator, i, path.at(i), analytic, generator)
                    tally.add(torch.full_like(rows, i), rows, torch.full_like(rows, replicate), value)
                done += len(rows)
                if progress is not None:
                    progress(done, draws * len(x))

    def _rung_by_rung(
        self, tally, estimator, analytic, x, condition, terms, draws, batch_size, generator, progress
    ) -> int:
        """Returns how many evaluations the pilot took."""

        def evaluate(visits: Visits, kind: int | None) -> Tensor:
            rows = visits.example
            i = visits.rung if kind is None else kind
            between = estimator not in ("matching", "continuous")
            place = self._place(i, x[rows], None if condition is None else condition[rows], between, generator)
            return self.term(estimator, i, place, analytic, generator).double().cpu()

        mixed, chances, extra = self.guide.mixed, None, 0
        if terms == "importance":
            pilot = Pilot(self.length)
            visits = pilot.plan(len(x), generator)
            values = torch.zeros(len(visits), dtype=torch.float64)
            for kind, chosen in visits.batches(batch_size, self.length, mixed):
                values[chosen] = evaluate(visits[chosen], kind)
            chances, extra = pilot.chances(visits, values), len(visits)
        visits = plan(terms, len(x), self.length, draws, generator, chances)
        done = 0
        for kind, chosen in visits.batches(batch_size, self.length, mixed):
            part = visits[chosen]
            tally.add(part.rung, part.example, part.replicate, part.weight * evaluate(part, kind))
            done += len(part)
            if progress is not None:
                progress(done, len(visits))
        return extra

    @torch.no_grad()
    def importance_weighted(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        *,
        samples: int = 64,
        seed: int = 0,
        batch_size: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> Likelihood:
        r"""The bound of K paths, which rises to log p(x) as K grows (Burda et al. 2016, arXiv 1509.00519, eq. 8).

        .. math:: \mathcal L_K = \mathbb E \log \frac1K \sum_{k=1}^K \frac{p(x, z^{(k)})}{q(z^{(k)}|x)}

        Args:
            samples: K.
            batch_size: paths drawn at once.

        Raises:
            ValueError: as :meth:`elbo`.
        """
        _check_elbo(x, condition, "shared", samples, batch_size)
        generator = stream("importance", seed)
        weights = torch.zeros(samples, len(x), dtype=torch.float64)
        visits = torch.arange(samples * len(x))
        with evaluating(self):
            for part in visits.split(batch_size):
                rows = part % len(x)
                weights.view(-1)[part] = (
                    self.log_weight(x[rows], None if condition is None else condition[rows], generator=generator)
                    .double()
                    .cpu()
                )
                if progress is not None:
                    progress(int(part[-1]) + 1, len(visits))
        log_prob = torch.logsumexp(weights, 0) - math.log(samples)
        error = error_of_mean((weights - log_prob).exp())  # of the logarithm of the mean, to first order
        prior = self.model.prior()
        kernels = self.length + (prior.length if isinstance(prior, Chain) else 0)
        return Likelihood(log_prob, error, x[0].numel(), samples * kernels, f"{samples} paths")

    def log_weight(self, x: Tensor, condition: Any = None, *, generator: torch.Generator | None = None) -> Tensor:
        """log p(x, z) - log q(z|x) of one draw of all latents, (B,), nats; those of a prior that is a chain too."""
        if self.guide.knows("marginal") and self.guide.knows("up") and self.model.markov:
            return self._log_weight_of_neighbours(x, condition, generator)
        path = self.path(x, condition, generator=generator)
        total = -self.term("path", 0, path.at(0))
        for i in range(1, self.length + 1):
            p = self._p(i, path.at(i).above, condition)
            if isinstance(p, Chain):
                of_model = p.log_weight(path.z[i], condition, generator=generator)
            else:
                of_model = log_prob_of(i, p, path.z[i])
            total = total + of_model - log_prob_of(i, path.laws[i], path.z[i])
        return total

    def _log_weight_of_neighbours(self, x: Tensor, condition: Any, generator: torch.Generator | None) -> Tensor:
        """The same of a Markov ladder, of which no more than two rungs are kept."""
        given, z, total = self.guide.read(x, condition), x, torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for i in range(1, self.length + 1):
            law = self._up(i, (z,), given)
            above = law.sample(generator=generator)
            p = self._p(i - 1, (above,), condition)
            total = total + log_prob_of(i - 1, p, z) - log_prob_of(i, law, above)
            z = above
        prior = self.model.prior(condition)
        if isinstance(prior, Chain):
            return total + prior.log_weight(z, condition, generator=generator)
        return total + log_prob_of(self.length, prior, z)


#: The most numbers of a batch of paths that are held at once.
MOST_HELD = 2**27


def _check_elbo(x: Tensor, condition: Tensor | None, terms: str, draws: int, batch_size: int) -> None:
    if terms not in TERMS:
        raise ValueError(f"terms must be one of {', '.join(TERMS)}, got {terms!r}")
    if draws < 1 or len(x) < 1:
        raise ValueError(f"a bound needs at least one example and one draw, got {len(x)} and {draws}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds values that are not finite")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if condition is not None and len(condition) != len(x):
        raise ValueError(f"one condition for each example expected: {len(x)} examples, {len(condition)} conditions")

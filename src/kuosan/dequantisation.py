"""From the density of noisy states, which the ODE gives, to the data: dequantisation, and the last step to x_0."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from kuosan.bound import Likelihood, error_of_mean
from kuosan.decoders import level_of
from kuosan.denoiser import Denoiser, evaluating
from kuosan.diffusion import decoder
from kuosan.gaussian import per_example
from kuosan.ode import AtEnd, Problem, Report, Solving, log_likelihood, start_of
from kuosan.seeds import stream


def data_bound(
    denoiser: Denoiser,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    q: str | Variational = "noise",
    samples: int = 1,
    draws: int = 1,
    decoder_variance: float | None = None,
    at_end: AtEnd = "prior",
    divergence: str = "exact",
    probes: int = 1,
    seed: int = 0,
    **solving: Unpack[Solving],
) -> Likelihood:
    r"""A lower bound on log P(x) of discrete data, or on log p_0(x) of continuous data, in nats.

    .. math::
        \log P(x) \ge \mathbb E_{y_1..y_K\sim q}\log\frac1K\sum_k \frac{p_{\text{start}}(y_k)\,P(x|y_k)}{q(y_k|x)}

    (Burda et al. 2016, arXiv 1509.00519.) It needs no limit of the ODE at the data, where it is stiff.

    Args:
        x: (B, ...), on the levels of [-1, 1] if ``denoiser.levels`` is not None.
        q: "noise": q(x_start | x_0 = x) of the process, and for P(x|y) the denoiser's decoder: its law over the levels,
            or a Gaussian around x0-hat, cut into bins for discrete data (cf. Zheng et al. 2023, arXiv 2305.03935).
            "uniform": y uniform in the level's bin, of width 2 / (L - 1), and P(x|y) = 1: rounding (Theis et al. 2016,
            arXiv 1511.01844, sec. 3.1). Or what :func:`fit_variational` returns: learned, inside the same bin.
        samples: K. More than one needs the exact divergence: the noise of probes inside the logarithm would lift the
            number above the bound.
        draws: independent repeats, whose mean is returned.
        decoder_variance: of the Gaussian decoder; None: sigma^2 / alpha^2 at ``start``.
        seed: of y and of the probes, each a function of (seed, index of the example).
        solving: :class:`Solving`; a batch is one of states y.

    The rest, and what is raised, as for :func:`log_likelihood`.
    """
    problem = Problem(denoiser, **solving)
    time, levels = problem.times[0], denoiser.levels
    if not isinstance(q, Variational) and q not in ("noise", "uniform"):
        raise ValueError(f'q must be "noise", "uniform" or what fit_variational returns, got {q!r}')
    if q != "noise" and levels is None:
        raise ValueError('only discrete data has bins to fill; for continuous data use q="noise"')
    if samples < 1 or draws < 1:
        raise ValueError(f"samples and draws must be at least 1, got {samples} and {draws}")
    if samples > 1 and divergence != "exact":
        raise ValueError('samples > 1 is a bound only with divergence="exact"; use draws= to lower the noise')
    if decoder_variance is not None and (q != "noise" or not decoder_variance > 0):
        raise ValueError(
            f'decoder_variance must be positive and is of the decoder of q="noise", got {decoder_variance}'
        )
    problem.check(x, condition)
    if levels is not None:
        level_of(x, levels)  # says what is wrong with data off the levels
    repeats = samples * draws
    if condition is not None:
        condition = condition.repeat_interleave(repeats, 0)
    noise = torch.stack([_noise(row, seed, (repeats, *x.shape[1:]), x, q == "uniform") for row in range(len(x))])
    wide, noise = x.repeat_interleave(repeats, 0), noise.flatten(0, 1).to(x.device)
    with torch.no_grad(), evaluating(denoiser):
        if isinstance(q, Variational):
            y, log_q = q(wide, noise)
        elif q == "uniform":
            assert levels is not None
            y, log_q = wide + (2 * noise - 1) / (levels - 1), torch.full_like(noise, math.log((levels - 1) / 2))
        else:
            law = denoiser.process.marginal(wide, time)
            y = law.sample(noise)
            log_q = law.log_prob(y)
        ratio = -per_example(log_q.double())
        if q == "noise":
            for rows in torch.arange(len(y)).split(problem.batch_size):
                given = None if condition is None else condition[rows]
                ratio[rows] += _decoded(denoiser, y[rows], time, given, wide[rows], decoder_variance)
    known = log_likelihood(
        denoiser, y, condition, at_end=at_end, divergence=divergence, probes=probes, seed=seed, **solving
    )
    ratio = (ratio + known.log_prob).reshape(len(x), draws, samples)
    bounds = torch.logsumexp(ratio, 2) - math.log(samples)
    name = q if isinstance(q, str) else "variational"
    what = "log p_0(x), a density" if levels is None else f"log P(x), a probability of {levels} levels"
    return Likelihood(
        log_prob=bounds.mean(1),
        example_error=error_of_mean(bounds.T),
        dimensions=known.dimensions,
        evaluations=draws * samples * (known.evaluations + (q == "noise")),
        quantity=f"lower bound on {what}, from time {time:g} by {samples} sample(s) of q = {name}, {draws} draw(s), "
        + problem.ending(at_end),
    )


def _noise(row: int, seed: int, shape: tuple[int, ...], x: Tensor, uniform: bool) -> Tensor:
    draw = torch.rand if uniform else torch.randn
    return draw(shape, generator=stream("dequantisation", seed, row), dtype=x.dtype)


def _decoded(
    denoiser: Denoiser, y: Tensor, t: float, condition: Tensor | None, x: Tensor, variance: float | None
) -> Tensor:
    """log P(x|y) of the denoiser's own decoder, (B,), nats."""
    return per_example(decoder(denoiser, denoiser(y, t, condition), variance).log_prob(x).double())


class Variational(nn.Module):
    r"""A learned q(y|x) inside the bin of each level: :math:`y = x + \frac{2\,\mathrm{sigmoid}(m + e^{l} z) - 1}{L-1}`.

    m and l are of each coordinate and come from a small network of all of x: independent Gaussians, squashed.

    Args:
        x: data of the shape and dtype to be dequantised.
        levels: L.
        width: of the network's hidden layer.
        noise: the standard deviation of y that it starts with, where that fits into a bin: no wider than uniform.
    """

    def __init__(self, x: Tensor, levels: int, width: int, noise: float):
        super().__init__()
        self.levels, d = levels, x[0].numel()
        last = nn.Linear(width, 2 * d)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        # sigmoid'(0) = 1/4; a standard deviation of 1.6 is nearest to uniform
        nn.init.constant_(last.bias[d:], math.log(min(2 * noise * (levels - 1), 1.6)))
        self.network = nn.Sequential(nn.Linear(d, width), nn.SiLU(), last).to(x)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log q(y|x) of each coordinate), of x's shape, from standard-normal z."""
        m, log_std = (part.reshape(x.shape) for part in self.network(x.flatten(1)).chunk(2, 1))
        a = m + log_std.exp() * z
        log_slope = math.log(2 / (self.levels - 1)) + logsigmoid(a) + logsigmoid(-a) + log_std  # dy/dz
        y = x + (2 * torch.sigmoid(a) - 1) / (self.levels - 1)
        return y, -0.5 * (z**2 + math.log(2 * math.pi)) - log_slope


def fit_variational(
    denoiser: Denoiser,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    start: float | None = None,
    steps: int = 1000,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    width: int = 64,
    seed: int = 0,
    progress: Report | None = None,
) -> Variational:
    r"""A q(y|x) that raises the bound :math:`\mathbb E[\log p_{\text{start}}(y) - \log q(y|x)]`, without any ODE.

    Only the gradient of log p_start is needed, and that is the denoiser's score at ``start``: Adam descends on
    log q(y|x) - score(y) . y with the score held fixed. The score of a trained network is only nearly the gradient of
    the ODE's density; q is then not quite the best, and the bound is still one, as it is for any q. Variational
    dequantisation: Ho et al. 2019, arXiv 1902.00275, sec. 3.1.

    Args:
        x: (N, ...), training data on the levels. Fit on other data than the bound is reported on.
        steps, batch_size, learning_rate: of Adam; the rate falls to zero along a half cosine.
        progress: called with (done, all) steps.

    Raises:
        ValueError: continuous data, data off the levels, or a model that is not a Denoiser.
    """
    time = start_of(denoiser, start)
    if denoiser.levels is None:
        raise ValueError("only discrete data has bins to fill: this denoiser is of continuous data")
    level_of(x, denoiser.levels)
    generator = stream("variational", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        q = Variational(x, denoiser.levels, width, float(denoiser.process.sigma(time)))
    optimiser = torch.optim.Adam(q.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with evaluating(denoiser):
        for step in range(steps):
            rows = torch.randint(0, len(x), (min(batch_size, len(x)),), generator=generator)
            part, given = x[rows], None if condition is None else condition[rows]
            z = torch.randn(part.shape, generator=generator, dtype=x.dtype).to(x.device)
            with torch.enable_grad():
                y, log_q = q(part, z)
                with torch.no_grad():
                    score = denoiser(y, time, given).score
                optimiser.zero_grad()
                (log_q - score * y).mean().backward()
            optimiser.step()
            decay.step()
            if progress is not None:
                progress(step + 1, steps)
    return q.requires_grad_(False)

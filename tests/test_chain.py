"""One bound for every ladder of latents (theory rows 2, 3, 5, 9, 10; errata 3, 4), against linear algebra in numpy."""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

import kuosan as ks
from conftest import ALL_SCHEDULES
from kuosan import Chain, DiffusionChain, Gaussian, Grid, Mixture, Process, schedules
from kuosan.kernels import Generative, Guide, Place
from kuosan.variance import OptimalVariance
from kuosan.visits import TERMS, Pilot, Visits, even, plan, shares_of

LINEAR = Process(ALL_SCHEDULES["linear_beta"])


def f64(value):
    return torch.as_tensor(value, dtype=torch.float64)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


# -- linear-Gaussian ladders: q and p in torch for the chain, and the same numbers in numpy for the truth --------------


@dataclass
class Affine:
    """The kernel N(sum of weights @ parents + shift, diag(variance)); the weights under the rung of each parent."""

    weights: dict[int, np.ndarray]
    shift: np.ndarray
    variance: np.ndarray

    def law(self, parents):
        pulls = (parents[j] @ f64(weight).T for j, weight in self.weights.items())
        return Gaussian(sum(pulls, f64(self.shift)), f64(self.variance))


class Rising(Guide):
    """Kernels 1 to T, each given some of what is below it."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels, self.length = kernels, len(kernels)

    def up(self, i, below, given):
        return self.kernels[i].law({i - 1 - k: z for k, z in enumerate(below)})


class Falling(Guide):
    """Kernels T to 1, each given x and some of what is above it."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels, self.length = kernels, len(kernels)

    def posterior(self, i, above, given):
        return self.kernels[i].law({0: given} | {i + 1 + k: z for k, z in enumerate(above)})


class Ladder(Generative):
    """Kernels 0 to T, each given some of what is above it."""

    def __init__(self, kernels, markov):
        super().__init__()
        self.kernels, self.length, self.markov = kernels, len(kernels) - 1, markov

    def prior(self, condition=None):
        return self.kernels[self.length].law({})

    def down(self, i, above, condition=None):
        return self.kernels[i].law({i + 1 + k: z for k, z in enumerate(above)})


class Line(Guide):
    """A Markov q of scalars that knows all its kernels, at one rung or many: z_i = a_i z_{i-1} + b_i + N(0, v_i)."""

    mixed = True

    def __init__(self, a, b, v):
        super().__init__()
        self.length, self.a, self.b, self.v = len(a) - 1, a, b, v
        moments = [(f64(1.0), f64(0.0), f64(0.0))]
        for i in range(1, len(a)):
            scale, shift, variance = moments[-1]
            moments.append((a[i] * scale, a[i] * shift + b[i], a[i] ** 2 * variance + v[i]))
        self.moments = [torch.stack(column) for column in zip(*moments, strict=True)]

    def up(self, i, below, given):
        a, b, v = (at(table, i) for table in (self.a, self.b, self.v))
        return Gaussian(a * below[0] + b, v)

    def marginal(self, i, given):
        scale, shift, variance = (at(table, i) for table in self.moments)
        return Gaussian(scale * given + shift, variance)

    def posterior(self, i, above, given):
        return self.seen(self.marginal(i, given), i + 1, above[0]) if above else self.marginal(i, given)

    def bridge(self, i, below, above, given):
        return self.seen(self.up(i, below, given), i + 1, above[0])

    def seen(self, law, i, z):
        """Bayes' rule for the parent of z = a_i parent + b_i + noise, by its gain."""
        a, b, v = (at(table, i) for table in (self.a, self.b, self.v))
        gain = a * law.variance / (a**2 * law.variance + v)
        return Gaussian(law.mean + gain * (z - a * law.mean - b), (1 - gain * a) * law.variance)


class OfLine(Generative):
    """A Markov p of scalars: z_i = w_i z_{i+1} + c_i + N(0, u_i)."""

    def __init__(self, w, c, u):
        super().__init__()
        self.length, self.w, self.c, self.u = len(c) - 1, w, c, u

    def prior(self, condition=None):
        return Gaussian(self.c[-1:], self.u[-1:])

    def down(self, i, above, condition=None):
        w, c, u = (at(table, i) for table in (self.w, self.c, self.u))
        return Gaussian(w * above[0] + c, u)


def at(table, i):
    return table[i][:, None] if isinstance(i, torch.Tensor) else table[i]


def joint(kernels, known=None):
    """Mean and covariance of all latents that have a kernel, from the lowest up: z = M z + c + noise, solved."""
    known = known or {}
    sizes = [len(kernels[i].shift) for i in sorted(kernels)]
    ends = np.cumsum([0, *sizes])
    where = {i: slice(ends[k], ends[k + 1]) for k, i in enumerate(sorted(kernels))}
    matrix, shift = np.zeros((ends[-1], ends[-1])), np.zeros(ends[-1])
    for i, kernel in kernels.items():
        shift[where[i]] += kernel.shift
        for j, weight in kernel.weights.items():
            if j in known:
                shift[where[i]] += weight @ known[j]
            else:
                matrix[where[i], where[j]] = weight
    solve = np.linalg.inv(np.eye(ends[-1]) - matrix)
    noise = np.concatenate([kernels[i].variance for i in sorted(kernels)])
    return solve @ shift, solve @ np.diag(noise) @ solve.T


@dataclass
class Case:
    """A chain, one x, and its kernels as numbers."""

    chain: Chain
    x: np.ndarray
    q: dict[int, Affine]
    p: dict[int, Affine]

    @property
    def sizes(self):
        return [len(self.q[i].shift) for i in sorted(self.q)]

    def copies(self, n):
        return f64(self.x).expand(n, -1)

    @functools.cached_property
    def log_p(self):
        mean, cov = joint(self.p)
        n = len(self.x)
        return float(stats.multivariate_normal(mean[:n], cov[:n, :n]).logpdf(self.x))

    @functools.cached_property
    def kl(self):
        """KL(q(z|x) || p(z|x)), the posterior by conditioning p's joint law."""
        n = len(self.x)
        mean, cov = joint(self.p)
        gain = np.linalg.solve(cov[:n, :n], cov[:n, n:]).T
        mean, cov = mean[n:] + gain @ (self.x - mean[:n]), cov[n:, n:] - gain @ cov[:n, n:]
        q_mean, q_cov = joint(self.q, {0: self.x})
        logs = np.linalg.slogdet(cov)[1] - np.linalg.slogdet(q_cov)[1]
        gap = mean - q_mean
        return float(np.trace(np.linalg.solve(cov, q_cov)) + gap @ np.linalg.solve(cov, gap) - len(gap) + logs) / 2

    @property
    def bound(self):
        return self.log_p - self.kl

    def terms(self, estimator, analytic=frozenset()):
        """(T + 1,): every term, averaged exactly. All are quadratic in the noise: 2n points +-sqrt(n) e_i will do."""
        n = sum(self.sizes)
        noise = math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)]).double()
        path = self.chain.path(self.copies(2 * n), noise=noise.split(self.sizes, 1))
        rungs = range(self.chain.length + 1)
        values = [self.chain.term(estimator, i, path.at(i), frozenset(analytic)) for i in rungs]
        return torch.stack([value.mean() for value in values])

    def by_cubature(self, estimator, analytic=frozenset()):
        return -float(self.terms(estimator, analytic).sum())


def kernel(dice, size, parents):
    weights = {j: 0.7 * dice.standard_normal((size, n)) / math.sqrt(n) for j, n in parents.items()}
    return Affine(weights, 0.5 * dice.standard_normal(size), dice.uniform(0.3, 1.2, size))


def ladder(length, seed=1, falls=False, skips=False):
    """Latents of 1 to 3 coordinates, any coefficients: q is not the posterior of p."""
    dice = np.random.default_rng(seed)
    sizes = [3, *(1 + (2 * i) % 3 for i in range(1, length + 1))]

    def parents(i, rungs, nearest):
        return {j: sizes[j] for j in rungs if skips or j in nearest}

    rungs = range(1, length + 1)
    if falls:
        q = {i: kernel(dice, sizes[i], parents(i, range(i + 1, length + 1), [i + 1]) | {0: 3}) for i in rungs}
    else:
        q = {i: kernel(dice, sizes[i], parents(i, range(i), [i - 1])) for i in rungs}
    p = {i: kernel(dice, sizes[i], parents(i, range(i + 1, length + 1), [i + 1])) for i in range(length + 1)}
    chain = Chain((Falling if falls else Rising)(q), Ladder(p, markov=not skips or length == 1))
    return Case(chain, dice.standard_normal(3), q, p)


def line(length, seed=1, uneven=0.0):
    """A Markov chain of scalars whose q is known in all ways; ``uneven``: the terms of some rungs are far larger."""
    dice = np.random.default_rng(seed)
    a, b, v = (
        dice.uniform(0.7, 0.95, length + 1),
        0.2 * dice.standard_normal(length + 1),
        dice.uniform(0.2, 0.6, length + 1),
    )
    w, c, u = (
        dice.uniform(0.6, 0.9, length + 1),
        0.2 * dice.standard_normal(length + 1),
        dice.uniform(0.2, 0.6, length + 1),
    )
    c[1:length] += uneven * (np.arange(1, length) > 0.8 * length)
    q = {i: Affine({i - 1: a[i : i + 1, None]}, b[i : i + 1], v[i : i + 1]) for i in range(1, length + 1)}
    p = {
        i: Affine({i + 1: w[i : i + 1, None]} if i < length else {}, c[i : i + 1], u[i : i + 1])
        for i in range(length + 1)
    }
    chain = Chain(Line(f64(a), f64(b), f64(v)), OfLine(f64(w), f64(c), f64(u)))
    return Case(chain, np.array([0.8]), q, p)


def exact_vae():
    """z ~ N(0.3, 0.8), x = 1.2 z - 0.1 + N(0, 0.5); q is the posterior, by completing the square."""
    precision = 1 / 0.8 + 1.2**2 / 0.5
    q = Affine(
        {0: np.array([[1.2 / 0.5 / precision]])},
        np.array([(0.3 / 0.8 + 0.12 / 0.5) / precision]),
        np.array([1 / precision]),
    )
    p = {
        0: Affine({1: np.array([[1.2]])}, np.array([-0.1]), np.array([0.5])),
        1: Affine({}, np.array([0.3]), np.array([0.8])),
    }
    return Case(Chain(Rising({1: q}), Ladder(p, True)), np.array([0.9]), {1: q}, p)


# -- rows 2 and 3: the bound and the divergence of q from the posterior make log p -------------------------------------

LENGTHS = pytest.mark.parametrize("length", [1, 2, 5, 10])


@LENGTHS
@pytest.mark.parametrize("skips", [False, True])
def test_of_a_q_going_up_the_bound_is_log_p_less_its_divergence_from_the_posterior(length, skips):
    """Both from joint covariances in numpy; T = 1 is the VAE, 2 the two-layer one, more the hierarchical ones."""
    case = ladder(length, skips=skips)
    assert case.kl > 0.1  # q is not the posterior, or this would say little
    for analytic in ((), (length,)):
        assert case.by_cubature("path", analytic) == pytest.approx(case.log_p - case.kl, abs=1e-10)


@LENGTHS
@pytest.mark.parametrize("skips", [False, True])
def test_of_a_q_coming_down_every_form_of_the_bound_is_the_same(length, skips):
    """numpy again; the matching form is the path's with each KL in closed form, and any of them may be."""
    case = ladder(length, falls=True, skips=skips)
    assert case.kl > 0.1
    rungs = range(1, length + 1)
    for analytic in ((), rungs, rungs[::2]):
        assert case.by_cubature("path", analytic) == pytest.approx(case.bound, abs=1e-10)
    assert case.by_cubature("matching") == pytest.approx(case.bound, abs=1e-10)


@LENGTHS
def test_of_a_q_known_in_all_ways_the_three_forms_are_one(length):
    """numpy; the printed consistency form is another number as soon as it can be (erratum 3)."""
    case = line(length)
    assert case.kl > 0.05
    for estimator in ("path", "matching", "bridge"):
        assert case.by_cubature(estimator) == pytest.approx(case.bound, abs=1e-10)
    assert case.by_cubature("path", [length]) == pytest.approx(case.bound, abs=1e-10)
    if length > 1:
        assert case.by_cubature("consistency_as_printed") < case.bound - 0.1


def test_a_vae_that_only_knows_its_encoder_has_the_matching_form_too():
    """With one rung, up and down are the same kernel."""
    case = ladder(1)
    assert case.by_cubature("matching") == pytest.approx(case.bound, abs=1e-10)


def test_a_two_layer_vae_whose_skips_are_zero_is_the_markov_one():
    """The same numbers with and without the mention of a second parent; with a real one they differ."""
    case = ladder(2)
    x = case.copies(50)
    q, p = dict(case.q), dict(case.p)
    q[2] = Affine(q[2].weights | {0: np.zeros((case.sizes[1], 3))}, q[2].shift, q[2].variance)
    totals = [case.chain.elbo(x, estimator="path", seed=2).total]
    for size in (0.0, 0.1):
        p[0] = Affine(case.p[0].weights | {2: np.full((3, case.sizes[1]), size)}, p[0].shift, p[0].variance)
        totals.append(Chain(Rising(q), Ladder(p, markov=False)).elbo(x, estimator="path", seed=2).total)
    markov, zero, real = totals
    assert torch.equal(markov, zero)
    assert float((markov - real).abs().min()) > 0


# -- row 10: the forms agree in expectation, whatever is drawn ---------------------------------------------------------


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("estimator", ["path", "matching", "bridge"])
@pytest.mark.parametrize("length", [1, 2, 10, 100])
def test_every_form_with_every_choice_of_terms_estimates_one_bound(length, estimator, terms):
    """numpy's number within 5 standard errors (of copies of one x: too large, if anything, for stratified terms)."""
    case = line(length)
    bound = case.chain.elbo(case.copies(4000), estimator=estimator, terms=terms, seed=length)
    mean, error = mean_and_error(bound.total)
    assert mean == pytest.approx(case.bound, abs=5 * error)
    assert error < 0.02 * (1 + length)


@pytest.mark.parametrize("terms", ["shared", "all"])
@pytest.mark.parametrize("length", [1, 2, 10, 100])
def test_the_forms_agree_on_a_diffusion_model_and_stay_below_log_p(length, terms, oracle):
    """Two forms of the same examples with noise of their own: 5 standard errors of the difference."""
    mixture = oracle.mixture()
    x = mixture.sample(1000, dice(3))
    chain = DiffusionChain(mixture.denoiser(LINEAR), grid=even_grid(length), variance="beta")
    path, matching, bridge = (
        chain.elbo(x, estimator=estimator, terms=terms, seed=seed).total
        for seed, estimator in enumerate(("path", "matching", "bridge"))
    )
    for one, other in itertools.combinations((path, matching, bridge), 2):
        mean, error = mean_and_error(one - other)
        assert abs(mean) < 5 * error or float((one - other).abs().max()) < 1e-12
    for total in (path, matching, bridge):
        mean, error = mean_and_error(mixture.log_prob(x) - total)
        assert mean > -5 * error


def even_grid(length):
    return Grid(tuple((length - i) / length for i in range(length)))


# -- row 5: three restrictions make it a diffusion model ---------------------------------------------------------------


def alpha_bar(t):
    """Of LinearBeta, by its integral."""
    return math.exp(-0.1 * t - 0.5 * 19.9 * t**2)


class FixedGuide(Guide):
    """A q as a hierarchical VAE has it, one kernel after another, with DDPM's coefficients (Ho et al. 2020)."""

    def __init__(self, length):
        super().__init__()
        self.length, self.bar = length, [alpha_bar(i / length) for i in range(length + 1)]

    def up(self, i, below, given):
        alpha = self.bar[i] / self.bar[i - 1]
        return Gaussian(math.sqrt(alpha) * below[0], f64(1 - alpha))

    def posterior(self, i, above, given):
        if not above:
            return Gaussian(math.sqrt(self.bar[i]) * given, f64(1 - self.bar[i]))
        return Gaussian(*self.back(i, above[0], given))

    def back(self, i, z, x):
        """mu-tilde and beta-tilde (eq. 7), from rung i + 1 to i."""
        alpha, rest = self.bar[i + 1] / self.bar[i], 1 - self.bar[i + 1]
        mean = math.sqrt(self.bar[i]) * (1 - alpha) / rest * x + math.sqrt(alpha) * (1 - self.bar[i]) / rest * z
        return mean, f64((1 - self.bar[i]) / rest * (1 - alpha))


class NetworkOfEachRung(Generative):
    def __init__(self, guide, networks):
        super().__init__()
        self.length, self.guide, self.networks = guide.length, guide, networks

    def prior(self, condition=None):
        return Gaussian(torch.zeros(2).double(), torch.ones(2).double())

    def down(self, i, above, condition=None):
        x_0 = self.networks[i](above[0])
        if i == 0:
            return Gaussian(x_0, f64(1 / self.guide.bar[1] - 1))
        return Gaussian(*self.guide.back(i, above[0], x_0))


class AllRungs(nn.Module):
    """The same networks, behind one that is told the time."""

    def __init__(self, networks):
        super().__init__()
        self.networks = networks

    def forward(self, x, t, condition=None):
        which = (t * len(self.networks)).round().long() - 1
        return torch.stack([self.networks[k](row) for k, row in zip(which.tolist(), x, strict=True)])


@pytest.mark.parametrize("length", [1, 2, 5, 30])
@pytest.mark.parametrize("estimator", ["path", "matching"])
def test_a_hierarchical_vae_with_a_fixed_q_is_the_diffusion_model(length, estimator):
    """Theory row 5: all terms along the same latents; the ladder's kernels are Ho et al.'s, in plain Python."""
    torch.manual_seed(length)
    networks = nn.ModuleList(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(length)).double()
    guide = FixedGuide(length)
    vae = Chain(guide, NetworkOfEachRung(guide, networks))
    diffusion = DiffusionChain(ks.Denoiser(AllRungs(networks), LINEAR, "x0"), grid=even_grid(length))
    x = torch.randn(6, 2, generator=dice(4)).double()
    noise = [torch.randn(6, 2, generator=dice(i)).double() for i in range(length)]
    with torch.no_grad():
        paths = [chain.path(x, noise=noise) for chain in (vae, diffusion)]
        for i in range(length + 1):
            ours, theirs = (c.term(estimator, i, p.at(i)) for c, p in zip((vae, diffusion), paths, strict=True))
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    totals = [chain.elbo(x, estimator=estimator, terms="shared", draws=3, seed=5).total for chain in (vae, diffusion)]
    assert torch.allclose(*totals, rtol=1e-9, atol=0)


# -- errata 3 and 4 ----------------------------------------------------------------------------------------------------

#: Two values of x at which the log-density of N(0.5, 0.36) is its mean.
TYPICAL = (0.5 + math.sqrt(0.6), 0.5 - math.sqrt(0.6))
LOG_P = -1.2414


@functools.cache
def gaussian_chain(length):
    """Data N(0.5, 0.36), the exact denoiser and its exact reverse variance."""
    times = f64([(i + 1) / length for i in range(length)])
    bar = f64([alpha_bar(float(t)) for t in times])
    variance = OptimalVariance(LINEAR, times, 0.36 * (1 - bar) / (0.36 * bar + 1 - bar))
    return DiffusionChain(Mixture([1.0], [[0.5]], [0.36]).denoiser(LINEAR), grid=even_grid(length), variance=variance)


def moments(length, x, estimator):
    """Exact mean and variance of each term, (T + 1,), under latents of its own.

    Three Gauss-Hermite nodes in each of z_{i-1}, z_i, z_{i+1}: the terms are quadratic, their squares of degree 4.
    """
    chain, bar = gaussian_chain(length), np.array([alpha_bar(i / length) for i in range(length + 1)])
    node, weight = np.polynomial.hermite_e.hermegauss(3)
    noise = np.stack(np.meshgrid(node, node, node, indexing="ij")).reshape(3, -1)
    weight = np.einsum("i,j,k->ijk", *[weight / weight.sum()] * 3).reshape(-1)
    z = [np.sqrt(bar[:-1, None]) * x + np.sqrt(1 - bar[:-1, None]) * noise[0]]  # (T, 27): z_{i-1} of rung i
    z.append(z[0] * np.sqrt(bar[1:] / bar[:-1])[:, None] + np.sqrt(1 - bar[1:] / bar[:-1])[:, None] * noise[1])
    z.append(z[1][:-1] * np.sqrt(bar[2:] / bar[1:-1])[:, None] + np.sqrt(1 - bar[2:] / bar[1:-1])[:, None] * noise[2])

    def term(i, below, here, above):
        here = f64(here).reshape(-1, 1)
        data, above = torch.full_like(here, x), () if above is None else (f64(above).reshape(-1, 1),)
        place = Place(data, None, data, above, (f64(below).reshape(-1, 1),), here)
        return chain.term(estimator, i, place).reshape(-1, 27).numpy()

    rows = [term(0, z[0][0], z[0][0], z[1][0])]
    if length > 1:
        rows.append(term(torch.arange(1, length).repeat_interleave(27), z[0][:-1], z[1][:-1], z[2]))
    rows.append(term(length, z[0][-1], z[1][-1], None))
    rows = np.concatenate(rows)
    mean = rows @ weight
    return mean, ((rows - mean[:, None]) ** 2) @ weight


def loss_of_the_printed_form(length):
    """sum of a_{t+1} sqrt(alpha_{t+1}) beta_t / v_{t+1}; the exact reverse has a / v = sqrt(alpha) / beta."""
    beta = [1 - alpha_bar((i + 1) / length) / alpha_bar(i / length) for i in range(length)]
    return sum((1 - after) * before / after for before, after in itertools.pairwise(beta))


@pytest.mark.parametrize(("length", "printed"), [(10, -3.73), (100, -86.9), (1000, -985.2)])
def test_the_printed_consistency_form_is_no_bound_worth_the_name(length, printed):
    """Erratum 3: exact averages, the printed form's known number to 1 %, its loss in closed form, and log p itself."""
    truth = float(np.mean(stats.norm.logpdf(TYPICAL, 0.5, 0.6)))
    assert truth == pytest.approx(LOG_P, abs=5e-5)
    found = {
        estimator: np.mean([-moments(length, x, estimator)[0].sum() for x in TYPICAL])
        for estimator in ("matching", "bridge", "consistency_as_printed")
    }
    assert found["matching"] == pytest.approx(truth, abs=1e-4)  # but for the prior, which is not quite q(x_T)
    assert found["bridge"] == pytest.approx(found["matching"], abs=1e-9)
    assert found["consistency_as_printed"] == pytest.approx(printed, rel=0.01)
    loss = found["bridge"] - found["consistency_as_printed"]
    assert loss == pytest.approx(loss_of_the_printed_form(length), rel=1e-9)


def test_asking_for_the_printed_form_warns_and_gives_its_number():
    """Erratum 3, through elbo: 5 standard errors of the exact averages."""
    x = f64(TYPICAL)[:, None].repeat(2000, 1)
    with pytest.warns(UserWarning, match="not a bound on log p"):
        bound = gaussian_chain(10).elbo(x, estimator="consistency_as_printed")
    truth = np.mean([-moments(10, value, "consistency_as_printed")[0].sum() for value in TYPICAL])
    by_point = bound.total.reshape(2000, 2).mean(1)
    mean, error = mean_and_error(by_point)
    assert mean == pytest.approx(truth, abs=5 * error)


@pytest.mark.parametrize(("length", "ratio"), [(10, 1.5), (100, 4.7), (1000, 6.7)])
@pytest.mark.parametrize("x", TYPICAL)
def test_with_draws_of_its_own_for_each_term_the_consistency_form_has_the_larger_variance(length, ratio, x):
    """Erratum 4: exact variances, summed over all T + 1 terms; known to two digits."""
    bridge, matching = (moments(length, x, estimator)[1].sum() for estimator in ("bridge", "matching"))
    assert bridge / matching == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("length", [10, 100])
def test_along_one_path_the_exact_model_has_no_variance_and_the_matching_form_has(length):
    """Erratum 4: p(x, z) / q(z|x) = p(x) whatever z, but for the prior, which is not quite q(x_T)."""
    x = f64(TYPICAL)[:, None].repeat(200, 1)
    truth = f64(stats.norm.logpdf(x[:, 0], 0.5, 0.6))
    path, matching, bridge = (
        gaussian_chain(length).elbo(x, estimator=estimator, terms="shared").total
        for estimator in ("path", "matching", "bridge")
    )
    assert float((path - truth).abs().max()) < 0.05  # z_T of 5 sigma times the prior's mean, which is 0.003
    assert float((path - truth).std()) < 0.01
    assert float((matching - truth).std()) > 0.5
    assert float((bridge - truth).std()) > 0.1


# -- a prior that is a chain itself ------------------------------------------------------------------------------------


class OnTopOf(Generative):
    """A decoder with another chain as its prior."""

    def __init__(self, decoder, prior):
        super().__init__()
        self.length, self.kernel, self.chain = 1, decoder, prior

    def prior(self, condition=None):
        return self.chain

    def down(self, i, above, condition=None):
        return self.kernel.law({1: above[0]})


def nested(exact):
    """A VAE over the latent of a VAE, and the two-layer ladder that the two make; each q the posterior, or not."""
    inner = exact_vae()
    decoder = Affine({1: np.array([[1.1], [-0.4]])}, np.array([0.2, 0.1]), np.array([0.5, 0.9]))
    p = {0: decoder, 1: Affine({2: inner.p[0].weights[1]}, inner.p[0].shift, inner.p[0].variance), 2: inner.p[1]}
    mean, cov = joint(p)
    gain = np.linalg.solve(cov[:2, :2], cov[:2, 2]).reshape(1, 2)
    q = {1: Affine({0: gain}, mean[2:3] - gain @ mean[:2], cov[2:3, 2] - gain @ cov[:2, 2])}
    q[2] = Affine({1: inner.q[1].weights[0]}, inner.q[1].shift, inner.q[1].variance)
    if not exact:
        q = {i: Affine(k.weights, k.shift + 0.3, 1.3 * k.variance) for i, k in q.items()}
    prior = Chain(Rising({1: Affine({0: q[2].weights[1]}, q[2].shift, q[2].variance)}), inner.chain.model)
    return Case(Chain(Rising({1: q[1]}), OnTopOf(decoder, prior)), np.array([0.4, -0.7]), q, p)


@pytest.mark.parametrize("estimator", ["path", "matching"])
@pytest.mark.parametrize("terms", ["shared", "all"])
def test_a_vae_whose_prior_is_a_vae_is_the_two_layer_one(estimator, terms):
    """The bound of the two-layer ladder in numpy, 5 standard errors."""
    case = nested(exact=False)
    assert case.kl > 0.1
    bound = case.chain.elbo(case.copies(20_000), estimator=estimator, terms=terms)
    mean, error = mean_and_error(bound.total)
    assert mean == pytest.approx(case.bound, abs=5 * error)
    assert 0 < error < 0.02


def test_nested_and_all_exact_the_bound_is_log_p():
    """Each q is the posterior: p(x, z) / q(z|x) is p(x) for every z, and so is every importance weight."""
    case = nested(exact=True)
    x = case.copies(20)
    assert case.kl == pytest.approx(0, abs=1e-12)
    truth = torch.full((20,), case.log_p, dtype=torch.float64)
    assert torch.allclose(case.chain.importance_weighted(x, samples=1).log_prob, truth, rtol=0, atol=1e-10)
    mean, error = mean_and_error(case.chain.elbo(case.copies(20_000), estimator="path").total)
    assert mean == pytest.approx(case.log_p, abs=5 * error)


def test_the_importance_weights_of_a_nested_chain_average_to_the_density():
    """E p(x, z) / q(z|x) = p(x) of the two-layer ladder in numpy; 5 standard errors."""
    case = nested(exact=False)
    ratio = (case.chain.log_weight(case.copies(200_000), generator=dice(5)) - case.log_p).exp()
    mean, error = mean_and_error(ratio)
    assert mean == pytest.approx(1, abs=5 * error)
    assert error < 0.02


def test_a_vae_whose_prior_is_a_diffusion_model_is_bounded_by_the_exact_density(oracle):
    """Latents from a mixture: x is a mixture too. With a q near the posterior and 100 steps most of the gap is gone."""
    mixture = oracle.mixture()
    decoder = Affine({1: np.array([[1.5], [-1.0]])}, np.array([0.1, 0.2]), np.array([0.01, 0.01]))
    gain = np.array([[1.5, -1.0]]) / 3.25  # least squares: the prior hardly matters at this noise
    q = Affine({0: gain}, -gain @ decoder.shift, np.array([0.01 / 3.25]))
    chain = DiffusionChain(mixture.denoiser(LINEAR), steps=100, variance="beta")
    vae = Chain(Rising({1: q}), OnTopOf(decoder, chain))
    x = decoder.law({1: mixture.sample(4000, dice(1))}).sample(generator=dice(2))
    truth = 0
    for w, m, v in zip(oracle.weights, oracle.means, oracle.variances, strict=True):
        mean, cov = joint({0: decoder, 1: Affine({}, np.array([m]), np.array([v]))})
        truth = truth + w * stats.multivariate_normal(mean[:2], cov[:2, :2]).pdf(x.numpy())
    for estimator in ("path", "matching"):
        gap, error = mean_and_error(f64(np.log(truth)) - vae.elbo(x, estimator=estimator).total)
        assert -5 * error < gap < 0.5
    weighted = vae.importance_weighted(x[:300], samples=64)
    gap, error = mean_and_error(f64(np.log(truth))[:300] - weighted.log_prob)
    assert -5 * error < gap < 0.5


# -- importance weighting ----------------------------------------------------------------------------------------------


def test_with_the_posterior_for_q_one_importance_sample_is_exact():
    """log p(x) of a linear-Gaussian VAE in numpy."""
    case = exact_vae()
    likelihood = case.chain.importance_weighted(case.copies(10), samples=1)
    truth = torch.full((10,), case.log_p, dtype=torch.float64)
    assert torch.allclose(likelihood.log_prob, truth, rtol=0, atol=1e-10)
    assert bool(likelihood.example_error.isnan().all())


@pytest.mark.parametrize("falls", [False, True])
def test_the_importance_weighted_bound_rises_to_log_p(falls):
    """K = 1 is the bound itself, and more only helps (Burda et al. 2016, theorem 1): numpy, 5 standard errors."""
    case = ladder(2, seed=4, falls=falls)
    x = case.copies(1000)
    found = [mean_and_error(case.chain.importance_weighted(x, samples=k, seed=k).log_prob) for k in (1, 8, 64, 512)]
    assert found[0][0] == pytest.approx(case.bound, abs=5 * found[0][1])
    for (low, low_error), (high, high_error) in itertools.pairwise(found):
        assert high - low > 5 * math.hypot(low_error, high_error)
    mean, error = found[-1]
    assert mean < case.log_p + 5 * error
    assert case.log_p - mean < 0.1 * case.kl


def test_the_noise_of_an_importance_weighted_example_is_the_spread_of_repetitions():
    """Two thousand copies of one x: chi-square at 1e-5, widened by a tenth for the logarithm being no straight line."""
    case = nearly_exact_vae()
    likelihood = case.chain.importance_weighted(case.copies(2000), samples=100)
    ratio = float(likelihood.log_prob.var() / (likelihood.example_error**2).mean())
    low, high = (stats.chi2.ppf(p, 1999) / 1999 for p in (1e-5, 1 - 1e-5))
    assert 0.9 * low < ratio < 1.1 * high
    assert likelihood.monte_carlo_error == pytest.approx(
        float(likelihood.log_prob.std()) / math.sqrt(2000) / math.log(2), rel=0.15
    )


def nearly_exact_vae():
    """A q that is wrong and wider than the posterior, so that no weight is large."""
    case = exact_vae()
    q = Affine(case.q[1].weights, case.q[1].shift + 0.1, 1.3 * case.q[1].variance)
    return Case(Chain(Rising({1: q}), case.chain.model), case.x, {1: q}, case.p)


# -- standard errors ---------------------------------------------------------------------------------------------------


def f_interval(first, second):
    return tuple(stats.f.ppf(p, first, second) for p in (1e-5, 1 - 1e-5))


@pytest.mark.parametrize("draws", [2, 8, 20])
@pytest.mark.parametrize("terms", TERMS)
def test_the_stated_noise_of_a_bound_is_the_spread_of_repetitions(terms, draws):
    """200 bounds of the same eight examples: their variance against the mean of what each states, an F test at 1e-5."""
    chain, x = line(3).chain, torch.linspace(-1, 1.5, 8).double()[:, None]
    bounds = [chain.elbo(x, terms=terms, draws=draws, seed=seed) for seed in range(200)]
    totals = torch.stack([bound.total for bound in bounds])
    replicates = min(draws, 8)
    for bound in bounds[:5]:
        shares = f64([len(part) for part in np.array_split(np.arange(draws), replicates)])
        assert torch.allclose(shares @ bound.replicates / draws, bound.total, rtol=1e-12)
    stated = np.mean([bound.monte_carlo_error**2 for bound in bounds])
    low, high = f_interval(199, 200 * (replicates - 1))
    assert low < float(totals.mean(1).var()) / stated < high
    stated = torch.stack([bound.example_error**2 for bound in bounds]).mean(0)
    ratio = float((totals.var(0) / stated).mean())  # of eight examples, hardly dependent: at least as sure
    assert low < ratio < high


@pytest.mark.parametrize("terms", TERMS)
def test_the_noise_of_a_single_draw_is_unknown(terms):
    bound = line(6).chain.elbo(f64([[0.1], [0.2]]), terms=terms, draws=1)
    assert math.isnan(bound.monte_carlo_error)
    assert bool(bound.example_error.isnan().all())
    assert math.isfinite(bound.standard_error)


# -- which terms are visited -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS)
def test_each_rung_of_a_drawn_bound_is_unbiased(terms):
    """Row by row against exact averages over the latents, 5 standard errors."""
    case = line(7, uneven=1.0)
    exact = case.terms("matching")
    bound = case.chain.elbo(case.copies(20_000), terms=terms)
    rows = torch.cat([-bound.reconstruction[None], bound.matching, bound.prior[None]])
    error = rows.std(1) / math.sqrt(20_000)
    assert bool(((rows.mean(1) - exact).abs() < 5 * error + 1e-10).all())
    assert float(exact[1:-1].max() / exact[1:-1].min()) > 5


@pytest.mark.parametrize("length", [1, 2, 3, 30, 200])
def test_the_chances_of_the_pilot_are_positive_sum_to_one_and_follow_the_terms(length):
    """Terms that are one in the upper half and nothing below, the decoder's too: all but the floor goes up there."""
    pilot = Pilot(length)
    visits = pilot.plan(3, dice())
    assert set(visits.example.tolist()) == {0, 1, 2}
    assert 0 == int(visits.rung.min()) <= int(visits.rung.max()) <= length - 1
    upper = torch.arange(length) >= length // 2
    for values in ((visits.rung >= length // 2).double(), torch.zeros(len(visits))):
        chances = pilot.chances(visits, values)
        assert chances.shape == (length,)
        assert float(chances.min()) > 0
        assert float(chances.sum()) == pytest.approx(1, abs=1e-12)
        if bool(values.any()) and length > 1:
            assert float(chances[upper].mean()) > 5 * float(chances[~upper].mean())
        else:
            assert torch.allclose(chances, torch.full_like(chances, 1 / length))


def test_where_the_terms_differ_a_lot_importance_has_the_smaller_variance():
    """An F test at 1e-3: 100 estimates of each; a fifth of the rungs has nearly all of the bound."""
    case = line(40, uneven=3.0)
    x = case.copies(4)

    def spread(terms):
        return float(
            torch.stack([case.chain.elbo(x, terms=terms, draws=4, seed=k).total.mean() for k in range(100)]).var()
        )

    assert spread("random") / spread("importance") > stats.f.ppf(0.999, 99, 99)


@pytest.mark.parametrize(("n", "draws"), [(1, 1), (1, 8), (5, 3), (7, 20)])
def test_stratified_points_are_one_in_each_stratum_and_an_example_s_own_are_spread(n, draws):
    """Counted: of each replicate one point in each of its share * n cells, and one of each example in each share."""
    shares = shares_of(draws)
    points = even(n, shares, dice())
    assert points.shape == (n * draws,)
    for share, part in zip(shares.tolist(), points.split((shares * n).tolist()), strict=True):
        assert sorted((part * share * n).long().tolist()) == list(range(share * n))
        own = (part.reshape(share, n) * share).long().sort(0).values
        assert torch.equal(own, torch.arange(share)[:, None].expand(share, n))


@pytest.mark.parametrize("terms", TERMS[2:])
def test_a_plan_visits_the_ends_once_and_one_rung_between_with_one_over_its_chance(terms):
    """Counted: 3 examples, 10 draws, 6 rungs; "importance" has chances, and draws the decoder like the others."""
    chances = f64([0.1, 0.1, 0.2, 0.2, 0.15, 0.25]) if terms == "importance" else None
    visits = plan(terms, 3, 6, 10, dice(), chances)
    assert len(visits) == 3 * 10 * (3 if chances is None else 2)
    for rung in (0, 6) if chances is None else (6,):
        chosen = visits[visits.rung == rung]
        assert torch.equal(chosen.example.bincount(), torch.full((3,), 10))
        assert bool((chosen.weight == 1).all())
    drawn = visits[(visits.rung > 0) & (visits.rung < 6)] if chances is None else visits[visits.rung < 6]
    assert torch.equal(drawn.example.bincount(), torch.full((3,), 10))
    expected = f64([1.0, 0.2, 0.2, 0.2, 0.2, 0.2]) if chances is None else chances
    assert torch.allclose(drawn.weight, 1 / expected[drawn.rung])


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_hold_every_visit_once_and_never_an_end_with_a_rung_between(mixed):
    visits = plan("all", 3, 4, 5, dice())
    seen = []
    for kind, chosen in visits.batches(7, 4, mixed):
        assert len(chosen) <= 7
        rungs = set(visits[chosen].rung.tolist())
        assert rungs == {kind} if kind is not None else rungs <= {1, 2, 3}
        assert (kind is None) <= mixed
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(visits)))
    assert isinstance(visits[:2], Visits)


# -- one estimate, to be trained on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ladder(3), id="going up"),
        pytest.param(lambda: ladder(3, falls=True), id="coming down"),
        pytest.param(lambda: line(1), id="known, T = 1"),
        pytest.param(lambda: line(6), id="known, T = 6"),
    ],
)
def test_an_estimate_is_unbiased(make):
    """numpy's bound, 5 standard errors of copies of one x: of a q going up, coming down, and known at every rung."""
    case = make()
    mean, error = mean_and_error(case.chain.estimate(case.copies(20_000), generator=dice(1)))
    assert mean == pytest.approx(case.bound, abs=5 * error)
    assert error < 0.1


@pytest.mark.parametrize("known", [False, True])
def test_the_gradient_of_an_estimate_is_that_of_finite_differences(known):
    """Of q and p alike, the noise held still: torch's gradcheck."""
    tables = [f64(column) for column in np.random.default_rng(2).uniform(0.4, 0.9, (6, 5))]

    class Hidden(Line):  # the same q, known only going up
        def knows(self, kernel):
            return kernel == "up"

    def estimate(*tables):
        chain = Chain((Line if known else Hidden)(*tables[:3]), OfLine(*tables[3:]))
        return chain.estimate(f64([[0.3], [-0.8], [1.0]]), generator=dice(3))

    assert torch.autograd.gradcheck(estimate, [table.requires_grad_() for table in tables])


def test_training_on_the_estimate_finds_the_posterior():
    """A VAE's q, free to be the posterior, trained by the chain alone: its bound becomes log p, in numpy."""
    case = exact_vae()
    table = [nn.Parameter(f64([0.0, value])) for value in (0.1, 0.0, 0.0)]
    x = f64(np.linspace(-2, 2, 64)[:, None])
    adam = torch.optim.Adam(table, lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 400)
    for step in range(400):
        chain = Chain(Line(table[0], table[1], table[2].exp()), case.chain.model)
        adam.zero_grad()
        (-chain.estimate(x, generator=dice(step)).mean()).backward()
        adam.step()
        decay.step()
    (weight,), (shift,), (variance,) = case.q[1].weights[0][0], case.q[1].shift, case.q[1].variance
    found = [float(part.detach()[1]) for part in (table[0], table[1], table[2].exp())]
    assert found == pytest.approx([weight, shift, variance], abs=0.03)


# -- laws of other kinds, conditions, and what is said while it works -------------------------------------------------


class Opaque:
    """A law that can only sample and score itself, (B,) at once."""

    def __init__(self, law):
        self.sample = lambda *, generator=None: law.sample(generator=generator)
        self.log_prob = lambda z: law.log_prob(z).sum(1)


@pytest.mark.parametrize("of", ["q", "p", "both"])
@pytest.mark.parametrize("analytic", [False, True])
def test_laws_that_only_sample_and_score_have_the_same_bound(of, analytic):
    """numpy's bound, 5 standard errors: where there is no closed form, one draw stands for it."""
    case = ladder(2, falls=True)
    guide, model = case.chain.guide, case.chain.model
    if of != "p":
        posterior = guide.posterior
        guide.posterior = lambda *parts: Opaque(posterior(*parts))
    if of != "q":
        prior, down = model.prior, model.down
        model.prior = lambda condition=None: Opaque(prior(condition))
        model.down = lambda *parts: Opaque(down(*parts))
    for estimator in ("path", "matching"):
        how = {"analytic": analytic} if estimator == "path" else {}
        mean, error = mean_and_error(case.chain.elbo(case.copies(20_000), estimator=estimator, **how).total)
        assert mean == pytest.approx(case.bound, abs=5 * error)
        assert error < 0.1


def test_the_bridge_form_wants_gaussians():
    case = line(3)
    path = case.chain.path(case.copies(2))
    case.chain.model.down = lambda *parts: Opaque(OfLine.down(case.chain.model, *parts))
    with pytest.raises(ValueError, match="rung 1: the bridge form needs Gaussian kernels; use estimator='path'"):
        case.chain.term("bridge", 1, path.at(1))


class Moved(Line):
    """Reads x without its condition."""

    def read(self, x, condition=None):
        return x - condition[:, None]

    def up(self, i, below, given):
        return super().up(i, (given,) if isinstance(i, int) and i == 1 else below, given)


class OfMoved(OfLine):
    """Data moved by their condition."""

    def down(self, i, above, condition=None):
        law = super().down(i, above)
        return Gaussian(law.mean + condition[:, None], law.variance) if isinstance(i, int) and i == 0 else law


@pytest.mark.parametrize("terms", TERMS)
def test_each_example_has_its_own_condition(terms):
    """Data moved by c given c have the bound that they had before, noise for noise, in batches of any size."""
    plain = line(4).chain
    moved = Chain(
        Moved(plain.guide.a, plain.guide.b, plain.guide.v), OfMoved(plain.model.w, plain.model.c, plain.model.u)
    )
    x, c = torch.linspace(-1, 1, 5).double()[:, None], f64([3.0, -1.0, 0.0, 7.0, 2.0])
    for size in (2, 1000):
        how = {"terms": terms, "draws": 3, "seed": 4, "batch_size": size}
        assert torch.allclose(moved.elbo(x + c[:, None], c, **how).total, plain.elbo(x, **how).total, rtol=1e-9)
    one, other = moved.importance_weighted(x + c[:, None], c, batch_size=3), plain.importance_weighted(x, batch_size=3)
    assert torch.allclose(one.log_prob, other.log_prob, rtol=1e-9)
    one, other = moved.estimate(x + c[:, None], c, generator=dice(1)), plain.estimate(x, generator=dice(1))
    assert torch.allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("terms", TERMS)
def test_progress_is_told_until_all_is_done(terms):
    """Ever more of the same whole, by at most one batch."""
    told = []
    line(4).chain.elbo(f64([[0.1]] * 5), terms=terms, draws=3, batch_size=4, progress=lambda *said: told.append(said))
    done, whole = zip(*told, strict=True)
    assert len(set(whole)) == 1
    assert done[-1] == whole[0]
    assert all(1 <= after - before <= 4 for before, after in itertools.pairwise((0, *done)))


def test_a_bound_is_evaluated_without_dropout_and_leaves_the_model_as_it_was():
    """Training mode before and after, not while a kernel is asked."""
    case, modes = line(3), set()
    down = case.chain.model.down

    def watched(*parts):
        modes.add(case.chain.model.training)
        return down(*parts)

    case.chain.model.down = watched
    case.chain.elbo(case.copies(2))
    case.chain.importance_weighted(case.copies(2), samples=2)
    assert modes == {False}
    assert case.chain.training
    assert case.chain.model.training


# -- the continuous form -----------------------------------------------------------------------------------------------

HIGH, LOW = 13.3, -5.0
CURVES = {
    "line": lambda t: HIGH + (LOW - HIGH) * t,
    "bent": lambda t: HIGH + (LOW - HIGH) * (0.3 * t + 0.7 * t**2),
    "wavy": lambda t: HIGH + (LOW - HIGH) * (t + 0.12 * torch.sin(2 * math.pi * t)),
}
CONTINUOUS_GAP = 4.9687e-5  # E log q(x_0) - E bound, nats, by independent quadrature
ENTROPY = 0.213944975263  # minus E log q(x_0)


def nodes_at(oracle, log_snr):
    """(x_0, noise, x_t, weight), each (n, 1): exact for what is quadratic in x_0, as in quadrature.joint_nodes."""
    alpha, noise = math.sqrt(special.expit(log_snr)), special.expit(-log_snr)
    w, m, v = (np.array(part) for part in (oracle.weights, oracle.means, oracle.variances))
    total = alpha**2 * v + noise
    width, reach = 0.1 * math.sqrt(total.min()), 8 * math.sqrt(total.max())
    x_t = np.arange(alpha * m.min() - reach, alpha * m.max() + reach, width)[:, None]
    mean, std = m + alpha * v / total * (x_t - alpha * m), np.sqrt(v * noise / total)
    x_0 = np.stack([mean - std, mean + std])
    weight = np.broadcast_to(w * stats.norm.pdf(x_t, alpha * m, np.sqrt(total)) * width / 2, x_0.shape)
    x_t = np.broadcast_to(x_t, x_0.shape)
    parts = (x_0, (x_t - alpha * x_0) / math.sqrt(noise), x_t, weight)
    return tuple(f64(np.ascontiguousarray(part).reshape(-1, 1)) for part in parts)


def mse_at(oracle, log_snr):
    """E (x_0 - E[x_0|x_t])^2 at a log-SNR, variance preserving: the mean of Var[x_0|x_t]."""
    alpha, noise = math.sqrt(special.expit(log_snr)), special.expit(-log_snr)
    w, m, v = (np.array(part) for part in (oracle.weights, oracle.means, oracle.variances))
    total = alpha**2 * v + noise
    x_t = np.linspace((alpha * m - 10 * np.sqrt(total)).min(), (alpha * m + 10 * np.sqrt(total)).max(), 4001)[:, None]
    parts = w * stats.norm.pdf(x_t, alpha * m, np.sqrt(total))
    share = parts / parts.sum(1, keepdims=True)
    mean = m + alpha * v / total * (x_t - alpha * m)
    spread = (share * (v * noise / total + mean**2)).sum(1) - (share * mean).sum(1) ** 2
    return float((parts.sum(1) * spread).sum() * (x_t[1, 0] - x_t[0, 0]))


@pytest.fixture(scope="module")
def truth_of_the_continuous_form(oracle):
    """(reconstruction, prior, integral over a stretch of log-SNR) in numpy alone."""
    m_1 = mse_at(oracle, HIGH)
    w, m, v = (np.array(part) for part in (oracle.weights, oracle.means, oracle.variances))
    alpha_2 = special.expit(LOW)
    prior = 0.5 * (alpha_2 * (w @ (m**2 + v)) - alpha_2 - math.log1p(-alpha_2))

    @functools.cache
    def stretch(low, high, nodes=12):
        node, weight = np.polynomial.legendre.leggauss(nodes)
        points = (low + high) / 2 + (high - low) / 2 * node
        return (high - low) / 4 * sum(a * math.exp(p) * mse_at(oracle, p) for a, p in zip(weight, points, strict=True))

    return m_1, -0.5 * math.log(2 * math.pi * math.e * m_1), prior, stretch


def variance_line(oracle, curve, m_1, steps):
    process = Process(schedules.from_log_snr(CURVES[curve]))
    return DiffusionChain(oracle.mixture().denoiser(process), steps=steps, variance="beta", decoder_variance=m_1)


def average(chain, estimator, i, nodes):
    """Of one term over the nodes of x_0 and what is above it."""
    x, _, above, weight = nodes
    place = Place(x, None, x, () if i == chain.length else (above,))
    return float(weight[:, 0] @ chain.term(estimator, i, place))


def test_the_gap_of_the_continuous_form_is_the_known_number(oracle, truth_of_the_continuous_form):
    """Independent quadratures of the formula, to 1e-8; the constants of the tests that follow."""
    _, reconstruction, prior, stretch = truth_of_the_continuous_form
    edges = np.linspace(LOW, HIGH, 11).tolist()
    integral = sum(stretch(low, high) for low, high in itertools.pairwise(edges))
    assert -ENTROPY - (reconstruction - prior - integral) == pytest.approx(CONTINUOUS_GAP, abs=1e-8)


@pytest.mark.parametrize("curve", CURVES)
def test_the_continuous_form_depends_on_the_schedule_s_ends_alone(
    curve, oracle, truth_of_the_continuous_form, monkeypatch
):
    """The chain's own terms with its draws replaced by a quadrature: the same number on three curves, to 1e-6."""
    m_1, reconstruction, prior, _ = truth_of_the_continuous_form
    chain = variance_line(oracle, curve, m_1, 16)
    node, share = np.polynomial.legendre.leggauss(10)
    edges = chain.guide.process.log_snr(chain.times).tolist()
    integral = 0.0
    for i, (high, low) in enumerate(itertools.pairwise(edges), start=1):
        u = (node + 1) / 2
        nodes = [nodes_at(oracle, high + part * (low - high)) for part in u]
        counts = torch.tensor([len(part[0]) for part in nodes])
        x, noise, x_t, weight = (torch.cat(parts) for parts in zip(*nodes, strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, u=u, counts=counts, **__: f64(u).repeat_interleave(counts))
            patch.setattr(torch, "randn", lambda *_, noise=noise, **__: noise)
            integral += average(
                chain, "continuous", i, (x, noise, x_t, weight * f64(share / 2).repeat_interleave(counts)[:, None])
            )
    ends = [-average(chain, "matching", i, nodes_at(oracle, HIGH)) for i in (0, 16)]
    assert ends == pytest.approx([reconstruction, -prior], abs=1e-7)  # the grid ends at t = 1e-9
    assert -ENTROPY - (sum(ends) - integral) == pytest.approx(CONTINUOUS_GAP, abs=1e-7)


@pytest.mark.parametrize("terms", ["all", "stratified"])
def test_each_stretch_of_the_continuous_form_is_estimated_without_bias(terms, oracle, truth_of_the_continuous_form):
    """numpy's integral over each step, and the bound itself: 5 standard errors over fresh data."""
    m_1, reconstruction, prior, stretch = truth_of_the_continuous_form
    chain = variance_line(oracle, "line", m_1, 8)
    x = oracle.mixture().sample(20_000, dice(6))
    bound = chain.elbo(x, estimator="continuous", terms=terms)
    edges = np.linspace(HIGH, LOW, 8).tolist()
    for row, (high, low) in zip(bound.matching, itertools.pairwise(edges), strict=True):
        mean, error = mean_and_error(row)
        assert mean == pytest.approx(stretch(low, high, 24), abs=5 * error)
    mean, error = mean_and_error(oracle.mixture().log_prob(x) - bound.total)
    assert mean == pytest.approx(CONTINUOUS_GAP, abs=5 * error)
    assert prior < reconstruction


def test_the_discrete_bound_tends_to_the_continuous_one(oracle, truth_of_the_continuous_form):
    """Exact averages: from below, and what is missing is in proportion to the length of a step."""
    missing = []
    for steps in (50, 200, 1000):
        chain = variance_line(oracle, "line", truth_of_the_continuous_form[0], steps)
        above = [*chain.guide.process.log_snr(chain.times).tolist(), LOW]
        cost = sum(average(chain, "matching", i, nodes_at(oracle, value)) for i, value in enumerate(above))
        missing.append(-ENTROPY - CONTINUOUS_GAP + cost)
    assert 0 < missing[2] < missing[1] < missing[0]
    assert missing[0] / missing[1] == pytest.approx(4, rel=0.1)
    assert missing[1] / missing[2] == pytest.approx(5, rel=0.1)


# -- bad input ---------------------------------------------------------------------------------------------------------


def misfit(rung, falls):
    """A ladder of three rungs where p speaks of two more coordinates than there are, at one rung."""
    case = ladder(3, falls=falls)
    p = dict(case.p)
    size = len(p[rung].shift) + 2
    p[rung] = Affine(
        {j: np.zeros((size, w.shape[1])) for j, w in p[rung].weights.items()}, np.zeros(size), np.ones(size)
    )
    return Chain(case.chain.guide, Ladder(p, True)), case.copies(4), size


@pytest.mark.parametrize("rung", [0, 1, 2])
@pytest.mark.parametrize(("estimator", "analytic"), [("path", False), ("path", True), ("matching", False)])
def test_kernels_of_different_shapes_are_refused_with_their_rung(rung, estimator, analytic):
    chain, x, size = misfit(rung, falls=True)
    words = rf"rung {rung}: q gives examples of shape \({size - 2},\), p of shape \({size},\)"
    with pytest.raises(ValueError, match=words):
        chain.elbo(x, estimator=estimator, analytic=analytic)


def test_a_prior_of_another_shape_is_refused_with_its_rung():
    chain, x, _ = misfit(3, falls=True)
    with pytest.raises(ValueError, match=r"rung 3: q gives examples of shape \(1,\), p of shape"):
        chain.elbo(x)


def test_the_printed_and_the_bridge_form_name_the_rung_that_does_not_fit():
    case = line(3)
    case.chain.model.c = torch.zeros(4, 2).double()
    path = case.chain.path(case.copies(5))
    for estimator in ("bridge", "consistency_as_printed", "path", "matching"):
        with pytest.raises(ValueError, match=r"rung 2: q gives examples of shape \(1,\), p of shape \(2,\)"):
            case.chain.term(estimator, 2, path.at(2))


@pytest.mark.parametrize("who", ["p", "q, going up", "q, coming down"])
def test_a_network_that_does_not_fit_says_at_which_rung(who):
    """torch names two sizes; the note adds the kernel, the rung and what it was given."""
    case = ladder(3, falls=who.endswith("down"))
    table, rung = (case.p, 1) if who == "p" else (case.q, 2)
    table[rung].weights = {j: np.zeros((w.shape[0], w.shape[1] + 1)) for j, w in table[rung].weights.items()}
    with pytest.raises(RuntimeError) as caught:
        case.chain.elbo(case.copies(4), estimator="path")
    (note,) = caught.value.__notes__
    parent = {"p": case.sizes[1], "q, going up": case.sizes[0], "q, coming down": case.sizes[2]}[who]
    assert f"kernel of {who}, at rung {rung}, given latents of shape ({parent},)" in note


@pytest.mark.parametrize(("up", "down"), [(2, 3), (3, 2)])
def test_q_and_p_of_different_lengths_make_no_chain(up, down):
    with pytest.raises(ValueError, match=f"q has {up} rungs and p has {down}: they must be as many"):
        Chain(ladder(up).chain.guide, ladder(down).chain.model)


def test_a_chain_has_a_latent():
    with pytest.raises(ValueError, match="at least one"):
        Chain(Rising({}), Ladder({0: Affine({}, np.zeros(1), np.ones(1))}, True))


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        (ladder(3), {"estimator": "matching"}, "this q is only known going up.*use estimator='path'"),
        (ladder(3), {"estimator": "bridge"}, "needs q's kernel 'bridge'"),
        (ladder(3, falls=True), {"estimator": "bridge"}, "needs q's kernel 'up'"),
        (ladder(3, falls=True), {"estimator": "consistency_as_printed"}, "needs q's kernel 'up'"),
        (ladder(3, skips=True), {"estimator": "consistency_as_printed"}, "this p has skip connections"),
        (
            ladder(3),
            {"estimator": "path", "analytic": [2]},
            "rung 2 has no closed form along a path.*valid for rungs 3",
        ),
        (ladder(3), {"estimator": "path", "analytic": [4]}, "names rung 4; the rungs are 1 to 3"),
        (ladder(3), {"estimator": "path", "analytic": [0]}, "names rung 0; the rungs are 1 to 3"),
        (ladder(3, falls=True), {"estimator": "matching", "analytic": True}, "analytic= belongs to estimator='path'"),
        (line(3), {"estimator": "bridge", "analytic": [3]}, "analytic= belongs to estimator='path'"),
        (line(3), {"estimator": "continuous"}, "matching, path, bridge, consistency_as_printed, got 'continuous'"),
        (line(3), {"terms": "some"}, "terms must be one of all, shared, random, stratified, importance, got 'some'"),
        (line(3), {"draws": 0}, "at least one example and one draw, got 4 and 0"),
        (line(3), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (line(3), {"condition": torch.zeros(3)}, "4 examples, 3 conditions"),
    ],
)
def test_a_bound_that_a_chain_does_not_have_is_refused_with_the_reason(case, options, words):
    with pytest.raises(ValueError, match=words):
        case.chain.elbo(case.copies(4), **options)


def test_the_bridge_form_is_one_of_markov_chains():
    case = line(3)
    case.chain.model.markov = False
    with pytest.raises(ValueError, match="this p has skip connections"):
        case.chain.elbo(case.copies(4), estimator="bridge")


@pytest.mark.parametrize("how", ["elbo", "importance_weighted"])
def test_bad_data_has_no_bound(how):
    """Not finite, none at all, or with conditions of another number."""
    chain = line(3).chain
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            getattr(chain, how)(f64([[0.0], [bad]]))
    with pytest.raises(ValueError, match="at least one example and one draw, got 0"):
        getattr(chain, how)(torch.zeros(0, 1).double())
    with pytest.raises(ValueError, match="2 examples, 3 conditions"):
        getattr(chain, how)(f64([[0.0], [0.1]]), torch.zeros(3))


def test_a_guided_model_has_no_bound(oracle):
    """Guidance samples from no density that anyone can write down."""
    guided = ks.ClassifierFree(oracle.mixture().denoiser(LINEAR))
    with pytest.raises(ValueError, match="pass the Denoiser itself, got ClassifierFree"):
        DiffusionChain(guided, steps=5)

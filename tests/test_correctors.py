"""Langevin, annealed Langevin and Metropolis-adjusted Langevin (theory rows 16 and 25) against kernels done by hand."""

import math

import pytest
import torch
from scipy import stats

import kuosan as ks
from conftest import ALL_SCHEDULES, named
from kuosan import Grid, Mixture, Prediction, Process
from kuosan.solvers import DDIM, Noise, run
from kuosan.solvers.correctors import MALA, Langevin, annealed

COSINE = Process(ALL_SCHEDULES["cosine"])
VE = Process(ALL_SCHEDULES["ve"])


def given(*draws):
    """A source of noise that gives these."""
    left = list(draws)
    return lambda: left.pop(0)


def normals(shape, dice):
    return lambda: torch.randn(shape, dtype=torch.float64, generator=dice)


def no_noise():
    raise AssertionError("noise was drawn")


class Pulls:
    """The score -x / v at every time; keeps the times and conditions that it was asked about."""

    def __init__(self, process, v=1.0):
        self.process, self.v, self.asked = process, v, []

    def __call__(self, x_t, t, condition=None):
        self.asked.append((t, condition))
        return Prediction(self.process, t, x_t, "score", -x_t / self.v)


def line_density(line, process, t):
    """log q_t and its derivative of a 1-D mixture, by scipy."""
    alpha, sigma = (float(c) for c in process.scales(t))
    means = [alpha * m for m in line.means]
    sds = [math.sqrt(alpha**2 * v + sigma**2) for v in line.variances]

    def density(x):
        return sum(w * stats.norm.pdf(x, m, s) for w, m, s in zip(line.weights, means, sds, strict=True))

    def slope(x):
        parts = zip(line.weights, means, sds, strict=True)
        return sum(w * stats.norm.pdf(x, m, s) * (m - x) / s**2 for w, m, s in parts) / density(x)

    return density, slope


# -- Langevin ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "rectified_flow"))
def test_a_langevin_step_is_the_printed_formula(schedule):
    """x + delta s + sqrt(2 delta) z, delta = 2 r^2 (sigma^2 + alpha^2 w^2); twice, with one draw for each step."""
    process, x, z = Process(schedule), torch.tensor([[0.4, -1.2]]).double(), torch.tensor([[0.3, 0.9]]).double()
    alpha, sigma = (float(c) for c in process.scales(0.4))
    delta = 2 * 0.2**2 * (sigma**2 + (0.5 * alpha) ** 2)
    model = Pulls(process, v=3.0)
    out = Langevin(snr=0.2, steps=2, width=0.5).on(model, given(z, -z), "a condition")(x, 0.4)
    first = x - delta * x / 3 + math.sqrt(2 * delta) * z
    assert torch.allclose(out, first - delta * first / 3 - math.sqrt(2 * delta) * z, rtol=1e-12)
    assert model.asked == [(0.4, "a condition")] * 2
    assert isinstance(model.asked[0][0], float)


def test_own_norms_are_algorithm_4_of_song_for_each_sample():
    """eps = 2 (r |z| / |g|)^2 with g = -x: each sample by its own norms."""
    x = torch.tensor([[3.0, 4.0], [0.6, 0.8]]).double()
    z = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).double()
    out = Langevin(snr=0.1, own_norms=True).on(Pulls(VE), given(z))(x, 0.5)
    for k, (norm_z, norm_g) in enumerate([(2.0, 5.0), (1.0, 1.0)]):
        delta = 2 * (0.1 * norm_z / norm_g) ** 2
        assert torch.allclose(out[k], x[k] - delta * x[k] + math.sqrt(2 * delta) * z[k])


def test_the_rule_without_norms_is_the_rule_with_them_in_many_dimensions(dice):
    """1,000 dimensions of little structure beside the noise: E|s|^2 is nearly d / sigma^2, the steps agree to 5 %."""
    flat = Mixture([1.0], torch.zeros(1, 1000), [0.1**2])
    alpha, sigma = (float(c) for c in COSINE.scales(0.5))
    x = math.sqrt((0.1 * alpha) ** 2 + sigma**2) * torch.randn(4, 1000, dtype=torch.float64, generator=dice)
    z = torch.randn(4, 1000, dtype=torch.float64, generator=dice)
    score = flat.score(x, COSINE, 0.5)
    own = 2 * (0.16 * z.norm(dim=1) / score.norm(dim=1)) ** 2
    assert own.tolist() == pytest.approx([Langevin().step_size(COSINE, 0.5)] * 4, rel=0.15)
    assert float(own.mean()) == pytest.approx(Langevin().step_size(COSINE, 0.5), rel=0.05)


@pytest.mark.parametrize("v", [1.0, 4.0])
def test_langevin_at_rest_has_the_variance_that_the_docstring_says(v, dice):
    """v / (1 - delta / 2v): 20,000 chains, 5 standard errors, and not v itself where the step is large."""
    n, sigma = 20_000, 1.0
    t = float(VE.schedule.time_of(torch.tensor(0.0, dtype=torch.float64)))  # sigma = alpha = 1
    corrector = Langevin(snr=0.5, steps=60)
    x = math.sqrt(v) * torch.randn(n, 1, dtype=torch.float64, generator=dice)
    x = corrector.on(Pulls(VE, v), normals((n, 1), dice))(x, t)
    delta = 2 * 0.5**2 * sigma**2
    truth = v / (1 - delta / (2 * v))
    assert float(x.var()) == pytest.approx(truth, rel=5 * math.sqrt(2 / n))
    assert abs(float(x.var()) - v) > 3 * v * math.sqrt(2 / n)


# -- the Metropolis test ----------------------------------------------------------------------------------------------


def mala_by_hand(line, t, delta, x, z):
    """(x', acceptance) from densities of scipy alone."""
    density, slope = line_density(line, COSINE, t)
    sd = math.sqrt(2 * delta)
    x_new = x + delta * slope(x) + sd * z
    forth = stats.norm.pdf(x_new, x + delta * slope(x), sd)
    back = stats.norm.pdf(x, x_new + delta * slope(x_new), sd)
    return x_new, min(1.0, density(x_new) * back / (density(x) * forth))


@pytest.mark.parametrize("t", [0.1, 0.4, 0.9])
def test_the_acceptance_of_every_proposal_is_metropolis_and_hastings_ratio(t, oracle, dice):
    """50 chains of 4 large steps: chance, decision and state of each against the ratio done by hand."""
    n, steps, seen = 50, 4, []
    model = oracle.mixture().energy_denoiser(COSINE)
    alpha, sigma = (float(c) for c in COSINE.scales(t))
    start = alpha * torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
    draws = [torch.randn(n, 1, dtype=torch.float64, generator=dice) for _ in range(2 * steps)]
    corrector = MALA(snr=0.9, steps=steps, watch=lambda at, a: seen.append((at, a)))
    end = corrector.on(model, given(*draws))(start, t)
    delta, states = 2 * 0.9**2 * sigma**2, start[:, 0].tolist()
    taken = 0
    for i in range(steps):
        for k in range(n):
            x_new, chance = mala_by_hand(oracle, t, delta, states[k], float(draws[2 * i][k]))
            assert float(seen[i][1][k]) == pytest.approx(chance, rel=1e-6, abs=1e-12)
            if stats.norm.cdf(float(draws[2 * i + 1][k])) < chance:
                states[k], taken = x_new, taken + 1
    assert end[:, 0].tolist() == pytest.approx(states, rel=1e-9, abs=1e-12)
    assert [at for at, _ in seen] == [t] * steps
    assert 0.05 * n * steps < taken < 0.95 * n * steps


def test_detailed_balance_between_any_two_points(oracle):
    """pi(x) q(y|x) a(x, y) = pi(y) q(x|y) a(y, x): the noise is chosen so that x is carried to y, and y to x."""
    t, model = 0.3, oracle.mixture().energy_denoiser(COSINE)
    density, slope = line_density(oracle, COSINE, t)
    _, sigma = (float(c) for c in COSINE.scales(t))
    delta = 2 * 0.7**2 * sigma**2
    sd = math.sqrt(2 * delta)

    def flow(x, y):
        chances = []
        z = (y - x - delta * slope(x)) / sd
        MALA(snr=0.7, watch=lambda at, a: chances.append(float(a))).on(
            model, given(*(torch.tensor([[v]], dtype=torch.float64) for v in (z, 0.0)))
        )(torch.tensor([[x]], dtype=torch.float64), t)
        return density(x) * stats.norm.pdf(y, x + delta * slope(x), sd) * chances[0]

    for x, y in [(-0.5, 0.4), (-0.2, 0.1), (0.0, 1.2), (0.9, -0.9), (0.5, 0.51)]:
        assert flow(x, y) == pytest.approx(flow(y, x), rel=1e-8)


def test_an_adjusted_chain_at_rest_stays_at_rest_and_an_unadjusted_one_does_not(tilted, dice):
    """40 large steps from exact draws of q_t: covariance within 5 standard errors; Langevin's own is far outside."""
    n, t = 4000, 0.3
    alpha, sigma = (float(c) for c in COSINE.scales(t))
    x_t = alpha * tilted.sample(n, dice) + sigma * torch.randn(n, 3, dtype=torch.float64, generator=dice)
    truth = alpha**2 * tilted.covariance() + sigma**2 * torch.eye(3).double()
    mean = alpha * tilted.mean()
    model, rates = tilted.energy_denoiser(COSINE), []

    def deviations(corrector):
        x = corrector.on(model, normals((n, 3), dice))(x_t, t)
        outer = (x - mean).unsqueeze(-1) * (x - mean).unsqueeze(-2)
        off_mean = (x.mean(0) - mean).abs() / (x.std(0) / math.sqrt(n))
        return max(float(off_mean.max()), float(((outer.mean(0) - truth).abs() / (outer.std(0) / math.sqrt(n))).max()))

    assert deviations(MALA(snr=0.8, steps=40, watch=lambda t, a: rates.append(float(a.mean())))) < 5
    assert 0.3 < sum(rates) / len(rates) < 0.9
    assert deviations(Langevin(snr=0.8, steps=40)) > 10


def test_a_proposal_that_is_not_finite_is_refused():
    class Cliff:
        process = COSINE

        def energy(self, x, t, condition=None):
            return torch.where(x[:, 0] > 0, torch.nan, 0.5 * (x**2).sum(1))

    x, rates = torch.tensor([[-0.1, 0.0]]).double(), []
    z = torch.tensor([[5.0, 0.0]]).double()
    out = MALA(watch=lambda t, a: rates.append(a)).on(Cliff(), given(z, 0 * z))(x, 0.5)
    assert torch.equal(out, x)
    assert rates[0].tolist() == [0.0]


# -- predictor-corrector ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjusted", [False, True])
def test_a_corrector_repairs_what_a_coarse_predictor_leaves(adjusted, ring, dice):
    """Two long DDIM steps over the ring to q_t at t = 0.15: with a corrector the spread of the radius is right."""
    n, grid = 2000, Grid((1.0, 0.45, 0.15))
    model = ring.energy_denoiser(COSINE) if adjusted else ring.denoiser(COSINE)
    draw, last = normals((n, 2), dice), []
    corrector = MALA(snr=0.4, steps=15, width=0.15) if adjusted else Langevin(snr=0.2, steps=40, width=0.15)
    table, x_init = DDIM().table(COSINE, grid), draw()
    for correct in (None, corrector.on(model, draw)):
        run(table, model, x_init, no_noise, correct=correct, watch=lambda i, x, p: last.append(x.clone()))
    alpha, sigma = (float(c) for c in COSINE.scales(0.15))
    truth = alpha**2 * ring.covariance()[0, 0] + sigma**2
    exact = alpha * ring.sample(200_000, dice) + sigma * torch.randn(200_000, 2, dtype=torch.float64, generator=dice)
    spread = exact.norm(dim=1).std()  # of the radius
    plain, corrected = last[2], last[5]
    assert float((corrected**2).mean()) == pytest.approx(float(truth), rel=0.03)
    assert float(corrected.norm(dim=1).std()) == pytest.approx(float(spread), rel=0.08)
    assert abs(float(plain.norm(dim=1).std()) / float(spread) - 1) > 0.2


@pytest.mark.parametrize("corrector", [Langevin(steps=2), Langevin(own_norms=True), MALA(steps=2)], ids=repr)
def test_a_corrected_sample_depends_on_its_own_seed_alone(corrector, tilted):
    """The same alone and in any batch, with the predictor's noise from the same stream."""
    model, table = tilted.energy_denoiser(COSINE), ks.solvers.Ancestral().table(COSINE, steps=5)

    def draw(seeds):
        noise = Noise(seeds, (3,), torch.float64)
        return run(table, model, noise.draw(), noise.draw, correct=corrector.on(model, noise.draw))

    together = draw([3, 1, 4])
    assert torch.allclose(together[2:], draw([4]), rtol=1e-9)
    assert torch.allclose(together[[1, 0]], draw([1, 3]), rtol=1e-9)


def test_correctors_work_on_images_in_float32(dice):
    """(B, C, H, W): norms, sums and decisions are of each sample."""
    white = Mixture([1.0], torch.zeros(1, 12), [0.5])

    class Image:
        process = COSINE

        def energy(self, x, t, condition=None):
            return -white.log_prob(x.flatten(1), COSINE, t).float()

        def __call__(self, x, t, condition=None):
            score = white.score(x.flatten(1), COSINE, t).reshape(x.shape).float()
            return Prediction(COSINE, t, x, "score", score)

    for corrector in (Langevin(), Langevin(own_norms=True), MALA(snr=0.7)):
        seen = []
        if isinstance(corrector, MALA):
            corrector = MALA(snr=0.7, watch=lambda t, a, seen=seen: seen.append(a))
        noise = Noise(range(6), (3, 2, 2))
        x = noise.draw()
        out = corrector.on(Image(), noise.draw)(x, 0.4)
        assert out.shape == (6, 3, 2, 2)
        assert out.dtype == torch.float32
        moved = (out != x).flatten(1)
        assert bool((moved.all(1) | ~moved.any(1)).all())
        assert bool(moved.any())
        assert all(a.shape == (6,) for a in seen)


# -- annealed Langevin dynamics ---------------------------------------------------------------------------------------


def test_annealed_langevin_is_algorithm_1_of_song_and_ermon():
    """Level by level from where the last one ended, alpha_i = eps sigma_i^2 / sigma_L^2; on VE; done by hand."""
    grid, steps, snr = Grid((0.9, 0.5, 0.2)), 2, 0.3
    sigmas = [float(VE.sigma(t)) for t in grid.times]
    eps = 4 * snr**2 * sigmas[-1] ** 2  # alpha_i / 2 = delta_i
    draws = [torch.tensor([[math.sin(k)]]).double() for k in range(6)]
    x = truth = torch.tensor([[2.0]]).double()
    left = iter(draws)
    for sigma in sigmas:
        a = eps * sigma**2 / sigmas[-1] ** 2
        for _ in range(steps):
            truth = truth + a / 2 * (-truth / 7) + math.sqrt(a) * next(left)
    model = Pulls(VE, 7.0)
    out = annealed(model, grid, x, Langevin(snr, steps), given(*draws), denoise=False)
    assert torch.allclose(out, truth, rtol=1e-10)
    assert [t for t, _ in model.asked] == [0.9, 0.9, 0.5, 0.5, 0.2, 0.2]
    denoised = annealed(model, grid, x, Langevin(snr, steps), given(*draws))
    assert torch.allclose(denoised, truth * (1 - sigmas[-1] ** 2 / 7), rtol=1e-10)


@pytest.mark.parametrize("schedule", named("cosine", "ve"))
def test_annealed_langevin_finds_the_data(schedule, oracle, dice):
    """Two modes of a line: their shares, mean and variance, 5 standard errors of 3,000 (and 3 % of Langevin's own)."""
    process, n = Process(schedule), 3000
    model, mixture = oracle.mixture().denoiser(process), oracle.mixture()
    grid = process.sampling_grid(50)
    x_init = float(process.prior(1.0).std) * torch.randn(n, 1, dtype=torch.float64, generator=dice)
    x = annealed(model, grid, x_init, Langevin(snr=0.3, steps=10, width=0.1), normals((n, 1), dice))[:, 0]
    mean, variance = float(mixture.mean()), float(mixture.covariance())
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert float(x.var()) == pytest.approx(variance, rel=0.03 + 5 * 0.6 / math.sqrt(n))
    assert float((x < 0).double().mean()) == pytest.approx(
        0.35 + 0.65 * stats.norm.cdf(0, 0.5, 0.2), abs=5 * 0.48 / math.sqrt(n)
    )


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Langevin(snr=0.0), "snr is the size of a step and must be positive, got 0.0"),
        (lambda: Langevin(snr=float("nan")), "snr is the size of a step"),
        (lambda: MALA(snr=-1.0), "snr is the size of a step"),
        (lambda: MALA(steps=0), "steps must be at least 1, got 0"),
        (lambda: Langevin(width=-0.1), "width is a standard deviation and at least 0"),
    ],
)
def test_a_corrector_that_cannot_be_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_metropolis_test_needs_an_energy(ring):
    x = torch.zeros(2, 2).double()
    with pytest.raises(ValueError, match='only a denoiser with predicts="energy" knows one; this one predicts x0'):
        MALA().on(ring.denoiser(COSINE), no_noise)(x, 0.5)
    with pytest.raises(ValueError, match="Pulls has no energy: a score alone does not tell one"):
        MALA().on(Pulls(COSINE), no_noise)(x, 0.5)

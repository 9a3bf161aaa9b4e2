"""Coefficient rules: their order against scipy, their formulas against the papers' written out, their ends and laws."""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import nn

from conftest import ALL_SCHEDULES
from kuosan import Denoiser, Grid, Process
from kuosan.prediction import FORMS, target
from kuosan.schedules import VE, Cosine, LinearBeta, RectifiedFlow, SubVP
from kuosan.solvers import (
    DDIM,
    DEIS,
    RK4,
    SOLVERS,
    AdamsBashforth,
    Ancestral,
    Auto,
    DPMSolver,
    DPMSolverPP,
    EDMHeun,
    Euler,
    EulerMaruyama,
    Heun,
    LinearBetaTime,
    Midpoint,
    UniformTime,
    UniPC,
    run,
)

VARIABLES = ("flow", "x0", "eps", "v", "velocity")
LINEAR = Process(LinearBeta(t_min=1e-9))

# -- the truth, in numpy alone: the fixture ``tilted``, its score, and the ODE solved by scipy -------------------------

WEIGHTS = np.array([0.4, 0.6])
MEANS = np.array([[-0.5, 0.3, 0.1], [0.6, -0.2, -0.4]])
COVARIANCES = np.array(
    [
        [[0.30, 0.10, -0.05], [0.10, 0.20, 0.08], [-0.05, 0.08, 0.25]],
        [[0.10, -0.04, 0.02], [-0.04, 0.40, 0.15], [0.02, 0.15, 0.15]],
    ]
)


def score(x, alpha, sigma):
    """The gradient of the log density of alpha x0 + sigma eps, (B, 3)."""
    covariances = alpha**2 * COVARIANCES + sigma**2 * np.eye(3)
    gaps = x[:, None] - alpha * MEANS
    pulls = np.einsum("kij,bkj->bki", np.linalg.inv(covariances), gaps)
    log_joint = np.log(WEIGHTS) - 0.5 * np.log(np.linalg.det(covariances)) - 0.5 * (gaps * pulls).sum(-1)
    share = np.exp(log_joint - log_joint.max(1, keepdims=True))
    return -((share / share.sum(1, keepdims=True))[..., None] * pulls).sum(1)


def noise_in(x, alpha, sigma):
    return -sigma * score(x, alpha, sigma)


def data_in(x, alpha, sigma):
    return (x - sigma * noise_in(x, alpha, sigma)) / alpha


def velocity(u, y):
    """eps - x0 on the line (1 - u) x0 + u eps: the ODE of every process, once x is divided by alpha + sigma."""
    x = y.reshape(-1, 3)
    eps = noise_in(x, 1 - u, u)
    return (eps - (x - u * eps) / (1 - u)).ravel()


FIRST, LAST = 0.75, 0.3  # u, where the measurement of an order begins and ends: sigma / alpha from 3 to 0.43
START = np.random.default_rng(0).standard_normal((8, 3)) * 0.8


@cache
def exact(end):
    return solve_ivp(velocity, (FIRST, end), START.ravel(), "DOP853", rtol=1e-13, atol=1e-14).y[:, -1].reshape(-1, 3)


def error(solver, process, mixture, steps, end=LAST):
    """RMSE at the end of so many steps, uneven in every clock; a multistep rule begins with a ramp of tiny ones.

    The ramp keeps the low order of its first steps out of the figure.
    """
    part = np.arange(steps + 1) / steps
    if solver.order > 1 or isinstance(solver, (AdamsBashforth, DPMSolver, UniPC)):
        part = np.concatenate([[0], 0.5 ** np.arange(16, 0, -1) / steps, part[1:]])
    u = FIRST + (end - FIRST) * (part + 0.3 * part * (1 - part))
    u = u if end else u[:-1]
    times = process.schedule.time_of(torch.from_numpy(2 * np.log((1 - u) / u))).tolist()
    table = solver.table(process, Grid(tuple(times)))
    seen = {}
    x = torch.from_numpy(START) * sum(process.scales(times[0]))
    out = run(table, mixture.denoiser(process), x, watch=lambda i, x, p: seen.__setitem__(p.t, x.clone()))
    if end:  # the state that is evaluated at the last time, before the step to the data
        out = seen[times[-1]] / sum(process.scales(times[-1]))
    return float(np.sqrt(((out.numpy() - exact(end)) ** 2).mean()))


def observed_order(solver, process, mixture, steps, end=LAST):
    coarse, fine = (error(solver, process, mixture, k, end) for k in (steps, 2 * steps))
    return math.log2(coarse / fine)


RUNGE_KUTTA = [
    (rule(v), order, 24) for v in VARIABLES for rule, order in ((Euler, 1), (Midpoint, 2), (Heun, 2), (RK4, 4))
]
ADAMS_BASHFORTH = [
    (AdamsBashforth(order, v, p), order, 200 if (v, p, order) == ("eps", "own", 4) else 40 if p == "time" else 64)
    for v in VARIABLES
    for p in (("own",) if v == "velocity" else ("own", "log_snr", "flow", "time"))
    for order in (1, 2, 3, 4)
]
CORRECTED = [  # the corrector makes it p + 1
    (AdamsBashforth(p, v, q, corrector=True), p + 1, 200 if (v, p) == ("eps", 4) else 100 if p == 4 else 64)
    for v in VARIABLES
    for q in (("own",) if v == "velocity" else ("own", "log_snr"))
    for p in (1, 2, 3, 4)
]
DPM_SOLVERS = [
    (rule(p, m), p, 64 if m else 24) for rule in (DPMSolver, DPMSolverPP) for p in (1, 2, 3) for m in (True, False)
]
UNIPC = [  # the corrector makes it p + 1, with the published rho = 1/2 too: UniC-1 has order 2 and UniPC-2 order 3
    (UniPC(p, b, v, corrector=c), p + c, 100 if p == 4 else 64)
    for p in (1, 2, 3, 4)
    for b in ("bh1", "bh2")
    for v in ("x0", "eps")
    for c in (False, True)
]
OTHERS = [(DEIS(), 3, 64), (DEIS(2), 2, 64), (EDMHeun(churn=0.0), 2, 24), (DDIM(), 1, 64)]
ALL_RULES = [*RUNGE_KUTTA, *ADAMS_BASHFORTH, *CORRECTED, *DPM_SOLVERS, *UNIPC, *OTHERS]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order", "steps"), [pytest.param(*r, id=repr(r[0])) for r in ALL_RULES])
def test_a_rule_has_its_order(solver, order, steps, tilted):
    """Twice as many steps divide the distance to scipy's solution (DOP853, 1e-13) by 2^order."""
    assert observed_order(solver, LINEAR, tilted, steps) == pytest.approx(order, abs=0.15)


CHOSEN = [
    (Midpoint("velocity"), 2, 24),
    (Heun("velocity"), 2, 24),
    (RK4("velocity"), 4, 64),
    (RK4("v"), 4, 12),
    (AdamsBashforth(3, "velocity"), 3, 80),
    (AdamsBashforth(4, "flow"), 4, 80),
    (AdamsBashforth(3, "x0", "time"), 3, 48),
    (DEIS(), 3, 64),
    (DPMSolver(3, multistep=False), 3, 12),
    (DPMSolverPP(3), 3, 80),
    (AdamsBashforth(3, corrector=True), 4, 80),
    (UniPC(3), 4, 80),
    (EDMHeun(churn=0.0), 2, 24),
]


@pytest.mark.slow
@pytest.mark.parametrize("process", [Process(s) for s in (VE(sigma_max=20.0), SubVP(), RectifiedFlow())], ids=repr)
@pytest.mark.parametrize(("solver", "order", "steps"), [pytest.param(*r, id=repr(r[0])) for r in CHOSEN])
def test_a_rule_has_its_order_under_every_convention(solver, order, steps, process, tilted):
    assert observed_order(solver, process, tilted, steps) == pytest.approx(order, abs=0.15)


TO_DATA = [
    *((rule(v), p, 32) for v in ("flow", "v", "velocity") for rule, p in ((Euler, 1), (Midpoint, 2), (RK4, 4))),
    *((rule("eps"), p, 64) for rule, p in ((Euler, 1), (Midpoint, 2), (RK4, 4))),
    *((AdamsBashforth(p, v), p, 100) for v in ("flow", "v", "velocity") for p in (1, 2, 3, 4)),
    *((AdamsBashforth(p, "eps"), p, 150 if p < 4 else 300) for p in (1, 2, 3, 4)),
    *((AdamsBashforth(p, corrector=True), p + 1, 100) for p in (1, 2, 3, 4)),  # one step uncorrected does not show
]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order", "steps"), [pytest.param(*r, id=repr(r[0])) for r in TO_DATA])
def test_these_rules_have_their_order_at_the_data_too(solver, order, steps, tilted):
    """The last step is no worse than the others (in x0 and log-SNR, whose clocks never arrive, the end has order 2)."""
    assert observed_order(solver, LINEAR, tilted, steps, end=0.0) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", [AdamsBashforth(3, "x0"), DPMSolverPP(3), UniPC(3)], ids=repr)
def test_a_clock_that_never_arrives_has_order_two_at_the_data(solver, tilted):
    """A step to the data by the last x0 alone: its error is of order 2, since x0-hat is even in the noise level."""
    assert 1.7 < observed_order(solver, LINEAR, tilted, 100, end=0.0) < 2.3


@pytest.mark.parametrize("solver", [AdamsBashforth(3, v) for v in VARIABLES[:-1]] + [RK4("v"), UniPC(3)], ids=repr)
def test_a_variable_of_the_noise_level_is_the_same_under_every_schedule(solver, tilted):
    """The same noise levels, the same states over (alpha + sigma), the same end: a schedule is only a clock."""
    errors = [
        error(solver, Process(s), tilted, 9, end=0.0)
        for s in (LinearBeta(), VE(sigma_min=1e-6, sigma_max=20.0), SubVP(), RectifiedFlow(), Cosine())
    ]
    assert errors == pytest.approx([errors[0]] * 5, rel=1e-7)


# -- the papers' formulas, written out --------------------------------------------------------------------------------

TIMES = (0.9, 0.75, 0.5, 0.35, 0.2, 0.08, 0.03)
X = np.random.default_rng(1).standard_normal((5, 3))


def scales(t):
    """(alpha, sigma, lambda) of the linear beta, from its formula."""
    abar = math.exp(-0.1 * t - 0.5 * 19.9 * t**2)
    return math.sqrt(abar), math.sqrt(1 - abar), 0.5 * math.log(abar / (1 - abar))


def time_of(lam):
    """t_lambda of the linear beta, by the root of its quadratic."""
    return (-0.1 + math.sqrt(0.01 + 4 * 9.95 * math.log1p(math.exp(-2 * lam)))) / 19.9


def eps_at(x, t):
    return noise_in(x, *scales(t)[:2])


def x0_at(x, t):
    return data_in(x, *scales(t)[:2])


def noises(count=40, seed=3):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(X.shape) for _ in range(count)]


def by_table(solver, mixture, process=LINEAR, times=TIMES, start=X):
    z = iter(noises())
    table = solver.table(process, Grid(times))
    return run(table, mixture.denoiser(process), torch.from_numpy(start), lambda: torch.from_numpy(next(z))).numpy()


def same(mine, theirs):
    return np.allclose(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_equation_12(eta, tilted):
    """Song et al. 2021, eq. 12 and 16, in abar as printed."""
    x, z = X, iter(noises())
    for t, s in pairwise(TIMES):
        now, then = scales(t)[0] ** 2, scales(s)[0] ** 2
        eps = eps_at(x, t)
        std = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        x = math.sqrt(then) * (x - math.sqrt(1 - now) * eps) / math.sqrt(now) + math.sqrt(1 - then - std**2) * eps
        x = x + std * next(z) if eta else x
    assert same(by_table(DDIM(eta), tilted), x0_at(x, TIMES[-1]))


def test_dpm_solver_plus_plus_2m_is_algorithm_2(tilted):
    """Lu et al. 2022, arXiv 2211.01095: D = (1 + 1/2r) x0 - 1/2r x0'."""
    x, before, h_before = X, None, None
    for t, s in pairwise(TIMES):
        (_, sigma_t, lam_t), (alpha_s, sigma_s, lam_s) = scales(t), scales(s)
        h, now = lam_s - lam_t, x0_at(x, t)
        r = None if before is None else h_before / h
        d = now if before is None else (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        x, before, h_before = sigma_s / sigma_t * x - alpha_s * (math.exp(-h) - 1) * d, now, h
    end = x0_at(x, TIMES[-1])
    assert same(by_table(DPMSolverPP(2), tilted), end)


def test_sde_dpm_solver_plus_plus_2m(tilted):
    """arXiv 2211.01095, SDE-DPM-Solver++(2M)."""
    x, before, h_before, z = X, None, None, iter(noises())
    for t, s in pairwise(TIMES):
        (_, sigma_t, lam_t), (alpha_s, sigma_s, lam_s) = scales(t), scales(s)
        h, now = lam_s - lam_t, x0_at(x, t)
        r = None if before is None else h_before / h
        d = now if before is None else now + (now - before) / (2 * r)
        x = sigma_s / sigma_t * math.exp(-h) * x + alpha_s * (1 - math.exp(-2 * h)) * d
        x, before, h_before = x + sigma_s * math.sqrt(1 - math.exp(-2 * h)) * next(z), now, h
    assert same(by_table(DPMSolverPP(2, sde=True), tilted), x0_at(x, TIMES[-1]))


def test_sde_dpm_solver_1(tilted):
    """arXiv 2211.01095, SDE-DPM-Solver-1: x_s = a_s/a_t x_t - 2 sigma_s (e^h - 1) eps + sigma_s sqrt(e^2h - 1) z."""
    x, z = X, iter(noises())
    for t, s in pairwise(TIMES):
        (alpha_t, _, lam_t), (alpha_s, sigma_s, lam_s) = scales(t), scales(s)
        h = lam_s - lam_t
        x = alpha_s / alpha_t * x - 2 * sigma_s * math.expm1(h) * eps_at(x, t)
        x = x + sigma_s * math.sqrt(math.expm1(2 * h)) * next(z)
    assert same(by_table(DPMSolver(1, sde=True), tilted), x0_at(x, TIMES[-1]))


def test_sde_dpm_solver_plus_plus_1_is_ancestral_sampling(process):
    """arXiv 2211.01095, section 6: coefficient by coefficient, under every schedule."""
    grid = Grid((0.9, 0.6, 0.35, 0.1))
    mine, theirs = (rule.table(process, grid).dense() for rule in (DPMSolverPP(1, sde=True), Ancestral()))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9 * max(1, float(b.abs().max())))


def test_dpm_solver_2_is_algorithm_1(tilted):
    """Lu et al. 2022, arXiv 2206.00927, with r_1 = 1/2."""
    x = X
    for t, s in pairwise(TIMES):
        (alpha_t, _, lam_t), (alpha_s, sigma_s, lam_s) = scales(t), scales(s)
        h, middle = lam_s - lam_t, time_of(0.5 * (lam_t + lam_s))
        alpha, sigma, _ = scales(middle)
        u = alpha / alpha_t * x - sigma * math.expm1(h / 2) * eps_at(x, t)
        x = alpha_s / alpha_t * x - sigma_s * math.expm1(h) * eps_at(u, middle)
    assert same(by_table(DPMSolver(2, multistep=False), tilted), x0_at(x, TIMES[-1]))


def test_dpm_solver_3_is_algorithm_2(tilted):
    """Lu et al. 2022, arXiv 2206.00927, with r_1 = 1/3 and r_2 = 2/3."""
    x, r_1, r_2 = X, 1 / 3, 2 / 3
    for t, s in pairwise(TIMES):
        (alpha_t, _, lam_t), (alpha_s, sigma_s, lam_s) = scales(t), scales(s)
        h, eps = lam_s - lam_t, eps_at(x, t)
        s_1, s_2 = time_of(lam_t + r_1 * h), time_of(lam_t + r_2 * h)
        (alpha_1, sigma_1, _), (alpha_2, sigma_2, _) = scales(s_1), scales(s_2)
        u_1 = alpha_1 / alpha_t * x - sigma_1 * math.expm1(r_1 * h) * eps
        d_1 = eps_at(u_1, s_1) - eps
        bend = sigma_2 * r_2 / r_1 * (math.expm1(r_2 * h) / (r_2 * h) - 1)
        u_2 = alpha_2 / alpha_t * x - sigma_2 * math.expm1(r_2 * h) * eps - bend * d_1
        d_2 = eps_at(u_2, s_2) - eps
        x = alpha_s / alpha_t * x - sigma_s * math.expm1(h) * eps - sigma_s / r_2 * (math.expm1(h) / h - 1) * d_2
    assert same(by_table(DPMSolver(3, multistep=False), tilted), x0_at(x, TIMES[-1]))


def test_dpm_solver_plus_plus_2s_is_algorithm_1(tilted):
    """arXiv 2211.01095 with r = 1/2: the x0 in the middle of the step's log-SNR."""
    x = X
    for t, s in pairwise(TIMES):
        (_, sigma_t, lam_t), (alpha_s, sigma_s, lam_s) = scales(t), scales(s)
        h, middle = lam_s - lam_t, time_of(0.5 * (lam_t + lam_s))
        alpha, sigma, _ = scales(middle)
        u = sigma / sigma_t * x - alpha * math.expm1(-h / 2) * x0_at(x, t)
        x = sigma_s / sigma_t * x - alpha_s * math.expm1(-h) * x0_at(u, middle)
    assert same(by_table(DPMSolverPP(2, multistep=False), tilted), x0_at(x, TIMES[-1]))


def third_order(x, times, model, scales, bend_by):
    """DPM-Solver++(3M) with D1, D2 of its authors' code; the parabola's integral needs twice their phi_3 D2."""
    past = []
    for t, s in pairwise(times):
        (_, sigma_t, lam_t), (alpha_s, sigma_s, lam_s) = scales(t), scales(s)
        h = lam_s - lam_t
        past.insert(0, (lam_t, model(x, t)))
        phi_1 = math.expm1(-h)
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        now, slope, bend = past[0][1], 0.0, 0.0
        if len(past) == 2:
            slope = (past[0][1] - past[1][1]) / ((past[0][0] - past[1][0]) / h)
            phi_2 = -0.5 * phi_1  # the multistep form of order 2
        if len(past) > 2:
            r_0, r_1 = (past[0][0] - past[1][0]) / h, (past[1][0] - past[2][0]) / h
            first, second = (past[0][1] - past[1][1]) / r_0, (past[1][1] - past[2][1]) / r_1
            slope, bend = first + r_0 / (r_0 + r_1) * (first - second), (first - second) / (r_0 + r_1)
        x = sigma_s / sigma_t * x - alpha_s * phi_1 * now + alpha_s * phi_2 * slope - bend_by * alpha_s * phi_3 * bend
    return x


def test_dpm_solver_plus_plus_3m_is_its_authors_with_the_curvature_doubled(tilted):
    x = third_order(X, TIMES, x0_at, scales, bend_by=2)
    assert same(by_table(DPMSolverPP(3), tilted), x0_at(x, TIMES[-1]))


@pytest.mark.parametrize(("bend_by", "order"), [(1, 2), (2, 3)])
def test_the_published_code_of_dpm_solver_plus_plus_3m_has_order_two(bend_by, order):
    """As printed (phi_3 D2 with D2 a divided difference, not a derivative) it loses the order that it is named for."""
    errors = []
    for steps in (200, 400):
        part = np.arange(steps + 1) / steps
        part = np.concatenate([[0], 0.5 ** np.arange(16, 0, -1) / steps, part[1:]])
        u = FIRST + (LAST - FIRST) * part
        times = [time_of(math.log((1 - v) / v)) for v in u]
        x = third_order(START * sum(scales(times[0])[:2]), times, x0_at, scales, bend_by)
        errors.append(np.sqrt(((x / sum(scales(times[-1])[:2]) - exact(LAST)) ** 2).mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def unipc(x, p, b, variable, times=TIMES):
    """Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8: corrected states, outputs at the predicted ones."""
    said = x0_at if variable == "x0" else eps_at
    past = [(scales(times[0])[2], said(x, times[0]))]
    for i, (t, s) in enumerate(pairwise(times)):
        (alpha_t, sigma_t, lam_t), (alpha_s, sigma_s, lam_s) = scales(t), scales(s)
        h = (lam_s - lam_t) * (-1 if variable == "x0" else 1)
        keep, size = (sigma_s / sigma_t, alpha_s) if variable == "x0" else (alpha_s / alpha_t, sigma_s)
        B = h if b == "bh1" else math.expm1(h)
        phi = [math.expm1(h) / h]
        for n in range(1, 6):
            phi.append((phi[-1] - 1 / math.factorial(n)) / h)

        def step(nodes, h=h, keep=keep, size=size, B=B, phi=phi, lam_t=lam_t, length=lam_s - lam_t, x=x):
            """nodes: (lambda, output) beside the newest."""
            r = np.array([(lam - lam_t) / length for lam, _ in nodes])
            matrix = np.array([(r * h) ** k for k in range(len(r))])
            right = np.array([h ** (k + 1) * math.factorial(k + 1) * phi[k + 1] / B for k in range(len(r))])
            a = np.full(len(r), 0.5) if len(r) < 2 else np.linalg.solve(matrix, right)
            differences = sum(c / rk * (m - past[0][1]) for c, rk, (_, m) in zip(a, r, nodes, strict=True))
            return keep * x - size * math.expm1(h) * past[0][1] - size * B * differences

        nodes = past[1 : min(p, i + 1)]
        predicted = step(nodes)
        newest = (lam_s, said(predicted, s))
        x = step([*nodes, newest])
        past.insert(0, newest)
    alpha, sigma, _ = scales(times[-1])
    return past[0][1] if variable == "x0" else (x - sigma * past[0][1]) / alpha


@pytest.mark.parametrize("variable", ["x0", "eps"])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc_is_its_recurrence_of_corrected_states(p, b, variable, tilted):
    assert same(by_table(UniPC(p, b, variable), tilted), unipc(X, p, b, variable))


def lagrange_integral(nodes, k, first, last):
    """Of the polynomial that is 1 at node k and 0 at the others, by numpy's polynomials."""
    others = [node for j, node in enumerate(nodes) if j != k]
    poly = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
    poly = poly / np.prod([nodes[k] - node for node in others])
    return poly.integ()(last) - poly.integ()(first)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_the_corrector_is_adams_moulton_on_corrected_states(p, tilted):
    """In the straight line's own variables: predict, evaluate, correct; the output is not evaluated again."""
    u = [sigma / (alpha + sigma) for alpha, sigma, _ in map(scales, TIMES)] + [0.0]
    y, outputs, states = X / sum(scales(TIMES[0])[:2]), [], []
    for i, t in enumerate(TIMES):
        alpha, sigma, _ = scales(t)
        total = alpha + sigma
        outputs.insert(0, (eps_at(total * y, t) - x0_at(total * y, t)))
        if i:  # now that the output at u_i is known, the step that led there once more
            nodes = u[i::-1][: 1 + min(p, i)]
            y = states[-1] + sum(lagrange_integral(nodes, k, u[i - 1], u[i]) * outputs[k] for k in range(len(nodes)))
        states.append(y)
        nodes = u[i::-1][: min(p, i + 1)]
        y = y + sum(lagrange_integral(nodes, k, u[i], u[i + 1]) * outputs[k] for k in range(len(nodes)))
    assert same(by_table(AdamsBashforth(p, corrector=True), tilted), y)


def deis_weight(nodes, j, t, s):
    def integrand(v):
        abar = scales(v)[0] ** 2
        others = math.prod((v - o) / (nodes[j] - o) for k, o in enumerate(nodes) if k != j)
        return others * (0.1 + 19.9 * v) / (2 * abar * math.sqrt(1 / abar - 1))

    return scales(s)[0] * quad(integrand, t, s, epsabs=1e-14, epsrel=1e-13)[0]


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_coefficients_of_deis_are_scipy_s(order):
    """Zhang and Chen 2022, eq. 14 and 15: Psi times the integral of the polynomials in t against d(sigma / alpha)."""
    table = DEIS(order).table(LINEAR, Grid(TIMES))
    for i, (t, s) in enumerate(pairwise(TIMES)):
        nodes = TIMES[max(0, i + 1 - order) : i + 1][::-1]
        truth = [deis_weight(nodes, j, t, s) for j in range(len(nodes))]
        assert table.rows[i].x == pytest.approx((scales(s)[0] / scales(t)[0],), rel=1e-12)
        assert table.rows[i].m == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("churn", [0.0, 1.5, 40.0])
def test_edm_is_algorithm_2(churn, tilted):
    """Karras et al. 2022, in VE, where alpha is 1: churn between S_min and S_max, S_noise, Heun, Euler at the end."""
    process, low, high, inflate = Process(VE()), 0.05, 4.0, 1.01
    levels = [8.0, 4.5, 2.0, 0.9, 0.3, 0.1, 0.03]
    times = tuple(math.log(level / 0.002) / math.log(40000) for level in levels)
    x, z, stirred = 8 * X, iter(noises()), 0

    def slope(x, level):
        return (x - data_in(x, 1.0, level)) / level

    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        gamma = min(churn / len(levels), math.sqrt(2) - 1) if low <= level <= high else 0.0
        hat = level * (1 + gamma)
        if gamma:
            x, stirred = x + math.sqrt(hat**2 - level**2) * inflate * next(z), stirred + 1
        d = slope(x, hat)
        y = x + (following - hat) * d
        x = x + (following - hat) * 0.5 * (d + slope(y, following)) if following else y
    assert stirred == (4 if churn else 0)
    assert same(by_table(EDMHeun(churn, low, high, inflate), tilted, process, times, 8 * X), x)


@pytest.mark.parametrize("kind", ["vp", "ve", "sub_vp"])
def test_euler_maruyama_is_the_reverse_sde(kind, tilted):
    """Song et al. 2021, arXiv 2011.13456, eq. 6 with the f and g of eq. 11, 9 and 12: VP, VE and sub-VP."""

    def beta(t):
        return 0.1 + 19.9 * t

    def law(t):  # alpha, sigma, f, g^2
        whole = 0.1 * t + 9.95 * t**2
        if kind == "vp":
            return math.exp(-0.5 * whole), math.sqrt(-math.expm1(-whole)), -0.5 * beta(t), beta(t)
        if kind == "sub_vp":
            return math.exp(-0.5 * whole), -math.expm1(-whole), -0.5 * beta(t), beta(t) * -math.expm1(-2 * whole)
        sigma = 0.002 * 40000**t
        return 1.0, sigma, 0.0, 2 * sigma**2 * math.log(40000)

    process = Process({"vp": LinearBeta(), "ve": VE(), "sub_vp": SubVP()}[kind])
    times = TIMES[:-2] if kind != "ve" else tuple(0.5 * t for t in TIMES)
    x, z = X, iter(noises())
    for t, s in pairwise(times):
        alpha, sigma, f, g2 = law(t)
        x = x - (t - s) * (f * x - g2 * score(x, alpha, sigma)) + math.sqrt(g2 * (t - s)) * next(z)
    mine = by_table(EulerMaruyama(), tilted, process, times)
    assert np.allclose(mine, data_in(x, *law(times[-1])[:2]), rtol=1e-9, atol=1e-9)


# -- rules that are the same rule -------------------------------------------------------------------------------------


def agree(mine, theirs, process, rtol=1e-9):
    one, two = (table.read_as("x0", process).dense() for table in (mine, theirs))
    return all(
        torch.allclose(a, b, rtol=rtol, atol=rtol * max(1, float(b.abs().max()))) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(
    ("polynomial", "exponential"),
    [
        (AdamsBashforth(3, "x0", "log_snr"), DPMSolverPP(3)),
        (AdamsBashforth(3, "eps", "log_snr"), DPMSolver(3)),
        (AdamsBashforth(3, "x0", "log_snr"), UniPC(3, corrector=False)),
        (AdamsBashforth(4, "eps", "log_snr"), UniPC(4, "bh1", "eps", corrector=False)),
    ],
    ids=repr,
)
def test_exponential_integrators_are_adams_bashforth_in_log_snr(process, polynomial, exponential):
    """From order 3 on they are the exact integrals of polynomials in log-SNR; order 2, their start, takes D1 / 2."""
    grid = Grid((0.95, 0.8, 0.55, 0.35, 0.2, 0.1))
    mine, theirs = (rule.table(process, grid).rows for rule in (polynomial, exponential))
    for i in (0, *range(2, len(grid))):
        assert mine[i].x == pytest.approx(theirs[i].x, rel=1e-9)
        assert mine[i].m == pytest.approx(theirs[i].m, rel=1e-7)
    assert mine[1].m != pytest.approx(theirs[1].m, rel=1e-7)


@pytest.mark.parametrize("polynomial", ["own", "log_snr", "flow", "time"])
@pytest.mark.parametrize("variable", ["flow", "x0", "eps"])
def test_one_point_in_any_straight_variable_is_ddim(process, variable, polynomial):
    """A constant output leaves nothing to interpolate: every first-order rule is DDIM, whatever its clock."""
    grid = Grid((0.95, 0.8, 0.55, 0.35, 0.2, 0.1))
    theirs = DDIM().table(process, grid)
    assert agree(AdamsBashforth(1, variable, polynomial).table(process, grid), theirs, process)
    assert agree(Euler(variable).table(process, grid), theirs, process)


def test_a_point_of_v_is_not_ddim():
    """v turns along the path, so that holding it is another rule of order 1: the chord of DDIM's arc."""
    grid = Grid((0.8, 0.4))
    assert not agree(AdamsBashforth(1, "v").table(LINEAR, grid), DDIM().table(LINEAR, grid), LINEAR, 1e-3)
    assert agree(AdamsBashforth(1, "v").table(LINEAR, grid), Euler("v").table(LINEAR, grid), LINEAR)


def test_in_the_rectified_flow_velocity_and_flow_are_one():
    process, grid = Process(RectifiedFlow()), Grid((1.0, 0.8, 0.5, 0.3, 0.2, 0.1))
    for order in (1, 2, 3, 4):
        flow, velocity = (AdamsBashforth(order, v).table(process, grid).rows[:-1] for v in ("flow", "velocity"))
        for a, b in zip(flow, velocity, strict=True):
            assert a.x == pytest.approx(b.x)
            assert a.m == pytest.approx(b.m)


def test_adams_bashforth_on_even_steps_has_the_textbook_s_weights():
    """Hairer, Norsett and Wanner, table III.1.1: 55/24, -59/24, 37/24, -9/24."""
    row = AdamsBashforth(4, "flow").table(Process(RectifiedFlow()), Grid((0.9, 0.8, 0.7, 0.6, 0.5))).rows[3]
    assert [-c / 0.1 for c in row.m] == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24], rel=1e-10)


# -- every rule under every schedule, for every network ----------------------------------------------------------------

EVERY = [
    *(DDIM(eta) for eta in (0.0, 0.5, 1.0)),
    *(Ancestral(v) for v in ("beta_tilde", "beta")),
    Auto(),
    *(rule(v) for rule in (Euler, Midpoint, Heun, RK4) for v in VARIABLES),
    *(AdamsBashforth(3, v, p) for v in VARIABLES for p in ("own", "log_snr", "flow", "time")),
    *(AdamsBashforth(order, v) for v in VARIABLES for order in (1, 2, 4)),
    *(AdamsBashforth(order, v, corrector=True) for v in VARIABLES for order in (1, 3)),
    *(DEIS(order) for order in (1, 2, 3, 4)),
    *(rule(order, m) for rule in (DPMSolver, DPMSolverPP) for order in (1, 2, 3) for m in (True, False)),
    *(rule(order, sde=True) for rule in (DPMSolver, DPMSolverPP) for order in (1, 2)),
    *(UniPC(p, b, v) for p in (1, 2, 3) for b in ("bh1", "bh2") for v in ("x0", "eps")),
    UniPC(4),
    UniPC(corrector=False),
    EulerMaruyama(),
    EDMHeun(),
    EDMHeun(churn=0.0),
]


class Knows(nn.Module):
    """A network that always means the same x0, and says it in any form."""

    def __init__(self, process, form, x_0):
        super().__init__()
        self.process, self.form, self.x_0 = process, form, x_0

    def forward(self, x, t, condition=None):
        t = float(t[0])
        alpha, sigma = self.process.scales(t)
        return target(self.form, self.process, t, self.x_0, (x - alpha * self.x_0) / sigma)


def missed(table, process, form, dtype):
    """How far from x0 the table ends, and the largest state on the way."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.tensor([[0.7, -0.2], [0.1, 1.3]], dtype=dtype)
    sizes = [1.0]

    def draw():
        return torch.randn(2, 2, dtype=dtype, generator=generator)

    def watch(i, x, prediction):
        sizes.append(float(x.abs().max()))

    x = process.prior().std.to(dtype) * draw()
    end = run(table, Denoiser(Knows(process, form, x_0), process, form), x, draw, watch=watch)
    return float((end - x_0).abs().max()), max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_every_rule_ends_on_the_data(solver):
    """Under every schedule, at as few steps as it takes and at more, for a network of any form: x0 itself, in float64.

    Where the noise is looked at, x / alpha rounds: 1,800 times as coarse as x at the start of the cosine schedule.
    """
    for name, schedule in ALL_SCHEDULES.items():
        process = Process(schedule)
        for steps in (solver.order, solver.order + 3):
            table = solver.table(process, steps=steps)
            for form in FORMS if steps > solver.order else ("x0", "eps", "flow"):
                assert missed(table, process, form, torch.float64)[0] < 1e-8, (name, form, steps)


@pytest.mark.parametrize("solver", [*(rule() for rule in SOLVERS.values()), AdamsBashforth(3, "v")], ids=repr)
def test_every_solver_ends_on_the_data_in_single_precision(solver):
    """To 1e-5, or 1e-6 of the largest state; where the noise is looked at, of x / alpha."""
    for name in ("linear_beta", "cosine", "ve", "sub_vp", "ddpm_table", "log_snr_line"):
        process = Process(ALL_SCHEDULES[name])
        table = solver.table(process, steps=solver.order + 2)
        for form in ("x0", "v", "eps"):
            error, size = missed(table, process, form, torch.float32)
            size /= float(process.alpha(1.0)) if "eps" in (form, solver.form) else 1.0
            assert error < max(1e-5, 1e-6 * size), (name, form)


@pytest.mark.parametrize("form", ["eps", "score"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_network_of_the_noise_starts_where_there_is_signal(form, steps, tilted):
    """The rectified flow begins with alpha = 0, where the noise is x itself: it is asked at a thousandth of signal."""
    process = Process(RectifiedFlow())

    class Net(nn.Module):
        def forward(self, x, t, condition=None):
            t = float(t[0])
            assert t < 1
            return target(form, process, t, *told(x, t))

    def told(x, t):
        x_0 = tilted.posterior_mean(x, process, t)
        return x_0, (x - (1 - t) * x_0) / t

    x = torch.from_numpy(X)
    mine, theirs = (
        run(AdamsBashforth(1).table(process, steps=steps), model, x)
        for model in (Denoiser(Net(), process, form), tilted.denoiser(process))
    )
    assert torch.allclose(mine, theirs, atol=3e-3)


def test_a_table_says_that_noise_alone_says_nothing():
    with pytest.raises(ValueError, match="at t = 1 there is no signal, and a model that predicts eps"):
        DDIM().table(Process(RectifiedFlow()), steps=3).read_as("eps", Process(RectifiedFlow()))


def test_the_step_to_the_data_stays_where_the_model_was_trained():
    """Midpoint's middle of the last step would have less noise than the process ever has: the model's x0 instead."""
    for name in ("sqrt", "ve", "ddpm_table", "alpha_bar_table"):
        process = Process(ALL_SCHEDULES[name])
        earliest = min(process.schedule.times(40).tolist())
        for solver in (Midpoint(), RK4(), Midpoint("eps"), RK4("v")):
            assert min(solver.table(process, steps=6).times) >= earliest * (1 - 1e-9), (name, solver)


@pytest.mark.parametrize("solver", [Auto(), DPMSolverPP(2), UniPC(2), RK4("v"), DEIS(), Heun("x0")], ids=repr)
@pytest.mark.parametrize("name", ["ve", "rectified_flow", "alpha_bar_table"])
def test_all_rules_converge_to_one_end(solver, name, tilted):
    process = Process(ALL_SCHEDULES[name])
    steps = 40
    x = float(process.prior().std) * torch.from_numpy(X)
    model = tilted.denoiser(process)
    mine = run(solver.table(process, steps=steps), model, x)
    theirs = run(AdamsBashforth(4, "flow").table(process, steps=steps), model, x)
    assert float((mine - theirs).pow(2).mean().sqrt()) < 0.02


# -- solvers of the SDE draw from the data's law -----------------------------------------------------------------------

STOCHASTIC = [
    ("linear_beta", EulerMaruyama(), 500),
    ("ve", EulerMaruyama(), 1000),
    ("sub_vp", EulerMaruyama(), 500),
    ("rectified_flow", EulerMaruyama(), 500),
    ("ve", EDMHeun(inflate=1.0), 100),
    ("linear_beta", EDMHeun(churn=20.0, inflate=1.0), 100),
    ("linear_beta", DPMSolverPP(1, sde=True), 300),
    ("linear_beta", DPMSolverPP(2, sde=True), 100),
    ("rectified_flow", DPMSolver(2, sde=True), 100),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "solver", "steps"), STOCHASTIC)
def test_the_law_of_the_data_comes_out(name, solver, steps, tilted, dice):
    """4,000 samples: mean and second moments within 5 standard errors of the mixture's own."""
    process, n = Process(ALL_SCHEDULES[name]), 4000

    def draw():
        return torch.randn(n, 3, dtype=torch.float64, generator=dice)

    spacing = UniformTime() if isinstance(solver, EulerMaruyama) else None
    x = run(solver.table(process, spacing, steps=steps), tilted.denoiser(process), process.prior().std * draw(), draw)
    mean = torch.from_numpy(WEIGHTS @ MEANS)
    second = torch.from_numpy(np.einsum("k,kij->ij", WEIGHTS, COVARIANCES + MEANS[:, :, None] * MEANS[:, None]))
    outer = x[:, :, None] * x[:, None]
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    assert bool(((outer.mean(0) - second).abs() < 5 * outer.std(0) / math.sqrt(n)).all())


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdamsBashforth(0), "order 1 to 4, got 0"),
        (lambda: AdamsBashforth(5), "order 1 to 4, got 5"),
        (lambda: AdamsBashforth(2, "noise"), "variable must be one of x0, eps, flow, v, velocity, got 'noise'"),
        (
            lambda: AdamsBashforth(2, "x0", "sigma"),
            "polynomial must be in one of own, log_snr, flow, time, got 'sigma'",
        ),
        (lambda: RK4("score"), "variable must be one of"),
        (lambda: DPMSolver(4), "order 1, 2 or 3, got 4"),
        (lambda: DPMSolverPP(3, sde=True), "multistep and of order 1 or 2"),
        (lambda: DPMSolverPP(2, multistep=False, sde=True), "multistep and of order 1 or 2"),
        (lambda: UniPC(5), "order 1 to 4, got 5"),
        (lambda: UniPC(b="bh3"), 'b is "bh1" or "bh2".*got \'bh3\''),
        (lambda: UniPC(variable="v"), 'variable "x0" or "eps"'),
        (lambda: EDMHeun(churn=-1.0), "churn >= 0"),
        (lambda: EDMHeun(low=2.0, high=1.0), "low <= high"),
        (lambda: AdamsBashforth(3).table(LINEAR, steps=2), "has order 3: it needs at least as many steps, got 2"),
        (lambda: RK4().table(LINEAR, steps=3), "has order 4: it needs at least as many steps, got 3"),
        (lambda: UniPC(4).table(LINEAR, Grid((1.0, 0.5))), "has order 4.*got 2"),
        (lambda: Heun().table(LINEAR), "either a grid of times or steps="),
        (lambda: Heun().table(LINEAR, Grid((1.0, 0.5)), steps=2), "either a grid of times or steps="),
        (lambda: DEIS().table(LINEAR, UniformTime()), "either a grid of times or steps="),
        (lambda: DEIS().table(LINEAR, Grid((1.0, 0.5, 0.5, 0.2))), "strictly decrease.*0.5 comes after 0.5"),
        (lambda: DEIS().table(LINEAR, Grid((0.2, 0.5, 1.0))), "strictly decrease"),
    ],
)
def test_a_rule_that_cannot_be_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "solver", [Ancestral(), EulerMaruyama(), EDMHeun(), DPMSolverPP(2, sde=True), DDIM(0.5)], ids=repr
)
def test_a_solver_of_the_sde_has_no_exact_trajectory(solver, tilted):
    with pytest.raises(ValueError, match="this table is stochastic: it has no one trajectory"):
        run(solver.table(LINEAR, steps=5), tilted.denoiser(LINEAR), torch.ones(2, 3).double())


def test_auto_has_as_much_order_as_there_are_steps():
    assert [Auto().rule(k).order for k in (1, 2, 3, 29, 30, 100)] == [1, 2, 3, 3, 4, 4]
    assert [Auto().rule(k).corrector for k in (1, 9, 10, 30)] == [False, False, True, True]
    for steps in (1, 2, 3, 10, 30):
        rule = Auto().rule(steps)
        assert Auto().table(LINEAR, steps=steps) == rule.table(LINEAR, LinearBetaTime(), steps=steps)

"""Tuned tables (theory row 24): nearer to the exact end of the ODE, never worse than their start, and repeatable."""

import math

import numpy as np
import pytest
import torch

import kuosan as ks
from conftest import ALL_SCHEDULES
from kuosan import Process
from kuosan.solvers import (
    DDIM,
    AdamsBashforth,
    Ancestral,
    DPMSolverPP,
    Errors,
    Heun,
    LinearBetaTime,
    Table,
    UniPC,
    run,
    tune,
)
from kuosan.solvers.tuning import Fine, Pairs, Tunable, starts

COSINE = Process(ALL_SCHEDULES["cosine"])
QUICK = {"pairs": 256, "iterations": 150, "batch_size": 64, "fine": 60, "dtype": torch.float64}


@pytest.mark.parametrize("name", list(ALL_SCHEDULES))
@pytest.mark.parametrize(
    "solver", [DDIM(), AdamsBashforth(3, "v", "flow"), AdamsBashforth(2, "x0", "log_snr"), DPMSolverPP(3), UniPC(2)]
)
def test_every_rule_is_one_choice_of_the_parameters(name, solver, tilted):
    """What the parameters compute, and the table made of them, is what the rule's own table computes."""
    process = Process(ALL_SCHEDULES[name])
    table = solver.table(process, steps=6)
    tunable, model = Tunable(process, table), tilted.denoiser(process)
    sigma = float(process.prior(1.0).std)
    x = sigma * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = run(table, model, x)
    assert torch.allclose(run(tunable.table(), model, x), truth, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(tunable(model, x), truth, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences(tilted):
    """With respect to a weight, a drift and a time, through the exact denoiser."""
    table = AdamsBashforth(3, "flow").table(COSINE, LinearBetaTime(), steps=4)
    tunable, model = Tunable(COSINE, table), tilted.denoiser(COSINE)
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss():
        return tunable(model, x).square().mean()

    loss().backward()
    for parameter, where in ((tunable.theta, (2, 3)), (tunable.theta, (1, 0)), (tunable.lengths, (2,))):
        h = 1e-6
        with torch.no_grad():
            parameter[where] += h
            above = float(loss())
            parameter[where] -= 2 * h
            below = float(loss())
            parameter[where] += h
        assert float(parameter.grad[where]) == pytest.approx((above - below) / (2 * h), rel=1e-4, abs=1e-7)


def test_times_stay_in_order_whatever_the_parameters(dice):
    table = DDIM().table(COSINE, steps=7)
    tunable = Tunable(COSINE, table)
    assert torch.allclose(tunable.times()[:-1], torch.tensor(table.times, dtype=torch.float64))
    with torch.no_grad():
        tunable.lengths += 2 * torch.randn(7, generator=dice).double()
    times = tunable.times()
    assert times[0].item() == 1
    assert times[-1].item() == 0
    assert bool((times.diff() < 0).all())


def pairs_of(model, process, n=40, fine=200):
    x = float(process.prior(1.0).std) * torch.randn(
        n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    return Fine(model, None, fine)(Pairs(x, None, x), path=True)


def test_the_path_between_the_fine_solution_s_times_is_a_cubic(tilted):
    """Through two states with their slopes: exact for cubics, and at the states themselves; the last is the end."""
    u = torch.tensor([0.9, 0.6, 0.35, 0.1, 0.0], dtype=torch.float64)[:, None, None]
    y, m = u**3 - 2 * u**2 + u * torch.ones(2, 3), 3 * u**2 - 4 * u + torch.ones(2, 3)
    made = Pairs(y[0], None, y[-1], tuple(u.flatten().tolist()), y, m)
    for v in (0.85, 0.6, 0.47, 0.11, 0.03, 0.0):
        assert torch.allclose(made.on_path(v), torch.full((2, 3), v**3 - 2 * v**2 + v).double(), atol=1e-14)
    pairs = pairs_of(tilted.denoiser(COSINE), COSINE)
    assert torch.equal(pairs.on_path(0.0), pairs.end)
    slope = (pairs.on_path(pairs.u[50] + 1e-5) - pairs.on_path(pairs.u[50] - 1e-5)) / 2e-5
    assert torch.allclose(slope, pairs.m[50], atol=1e-4)  # the outputs are the path's own slopes


def test_each_row_is_the_least_squares_fit_to_where_the_fine_solution_is(tilted):
    """Row by row by numpy's lstsq, each from where the rows before it arrived."""
    model = tilted.denoiser(COSINE)
    pairs = pairs_of(model, COSINE)
    tunable = Tunable(COSINE, AdamsBashforth(3).table(COSINE, steps=5))
    before = tunable.times().detach().clone()
    tunable.regress(model, pairs, ridge=0.0)
    assert torch.equal(tunable.times(), before)
    times = tunable.times().tolist()
    scales = [COSINE.scales(torch.tensor(t, dtype=torch.float64)) for t in times]
    u, g = [float(s / (a + s)) for a, s in scales], [float(a + s) for a, s in scales]
    y = y_0 = (pairs.x / g[0]).numpy()
    outputs = []
    for i, t in enumerate(times[:-1]):
        outputs.append(model(torch.from_numpy(y * g[i]), t).flow.numpy())
        columns = np.stack([y_0.ravel(), *((u[i + 1] - u[i]) * m.ravel() for m in outputs)], 1)
        fit = columns @ np.linalg.lstsq(columns, (pairs.on_path(u[i + 1]).numpy() - y).ravel(), rcond=None)[0]
        y = y + fit.reshape(y.shape)
    assert np.allclose(run(tunable.table(), model, pairs.x).numpy(), y, atol=1e-7)
    start = run(AdamsBashforth(3).table(COSINE, steps=5), model, pairs.x)
    assert Errors.of(torch.from_numpy(y), pairs.end).rmse < 0.5 * Errors.of(start, pairs.end).rmse


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 10])
def test_a_tuned_table_is_much_nearer_on_points_that_it_never_saw(steps, ring):
    """Against 400 steps of order 4, on other points than tune() drew: half the start's RMSE or less."""
    process = Process(ALL_SCHEDULES["ve"])
    model = ring.denoiser(process)
    found = tune(model, (2,), steps, **QUICK | {"pairs": 1024, "iterations": 400, "fine": 100})
    x = 80 * torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    truth = run(AdamsBashforth(4, "flow").table(process, LinearBetaTime(), steps=400), model, x)
    fixed = min((Errors.of(run(t, model, x), truth) for _, t in starts(process, steps)), key=lambda e: e.rmse)
    tuned = Errors.of(run(found.table, model, x), truth)
    assert found.improved
    assert found.table.evaluations == steps
    assert tuned.rmse < 0.5 * fixed.rmse
    assert tuned.rmse == pytest.approx(found.errors.rmse, rel=0.5)  # what it reported is what others find


def test_the_same_seed_gives_the_same_table_bit_for_bit(ring):
    model = ring.denoiser(COSINE)
    first, again = (tune(model, (2,), 4, seed=3, **QUICK) for _ in range(2))
    other = tune(model, (2,), 4, seed=4, **QUICK)
    assert first == again
    assert first.table != other.table


def test_a_table_worse_than_its_start_is_never_given(ring, monkeypatch):
    """A learning rate that throws everything away, and nothing fitted before: what comes back is the start."""
    monkeypatch.setattr(Tunable, "regress", lambda *_: None)
    found = tune(ring.denoiser(COSINE), (2,), 4, learning_rate=30.0, **QUICK)
    assert not found.improved
    assert found.errors == found.start_errors
    assert found.table in [table for _, table in starts(COSINE, 4)]


def test_tuning_follows_guidance_labels_and_transform(ring):
    """They reach every evaluation, of the fine solution too: labels in turn, x0 clipped."""
    seen, clipped = [], []

    class Model:
        process = COSINE

        def __call__(self, x_t, t, condition=None):
            seen.append(condition)
            return ring.denoiser(COSINE)(x_t, t)

    def clip(x):
        clipped.append(x)
        return x.clamp(-1, 1)

    found = tune(Model(), (2,), 3, labels=lambda n: torch.arange(n) % 5, transform=clip, **QUICK)
    assert all(given is not None and int(given.max()) <= 4 for given in seen)
    assert len(clipped) == len(seen)
    assert math.isfinite(found.errors.rmse)


def test_a_table_is_written_and_read_without_losing_a_bit():
    table = UniPC(3).table(COSINE, steps=7)
    assert Table.from_json(table.to_json()) == table
    with pytest.raises(ValueError, match="only a table of plain numbers"):
        Ancestral("learned").table(COSINE, steps=4).to_json()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tunable(COSINE, Ancestral().table(COSINE, steps=4)), "without noise can be tuned"),
        (lambda: Tunable(COSINE, Heun().table(COSINE, steps=4)), "evaluates once in each step"),
        (lambda: tune(None, (2,), 0), "must be at least 1"),
        (lambda: tune(None, (2,), 50, fine=50), "more steps than the table's 50"),
        (lambda: tune(None, (2,), 1, fine=3), "of order 4, must have more steps"),
    ],
)
def test_what_cannot_be_tuned_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ks_reaches_it():
    assert ks.solvers.tune is tune

"""Tables, the one executor and seeds (theory rows 13, 14, 15) against closed forms and exact mixtures."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kuosan as ks
from conftest import ALL_SCHEDULES, elbo, named
from kuosan import Denoiser, Grid, Mixture, Prediction, Process
from kuosan.prediction import FORMS
from kuosan.solvers import (
    DDIM,
    RK4,
    SOLVERS,
    AdamsBashforth,
    Ancestral,
    EDMHeun,
    Noise,
    Row,
    Table,
    UniPC,
    check_seeds,
    run,
)

DDPM = Process(ALL_SCHEDULES["ddpm_table"])
LINEAR = Process(ALL_SCHEDULES["linear_beta"])


class Knows:
    """A model that always says the same x0 and counts how often it was asked."""

    def __init__(self, process, x_0):
        self.process, self.x_0, self.asked = process, x_0, []

    def __call__(self, x_t, t, condition=None):
        self.asked.append(t)
        return Prediction(self.process, t, x_t, "x0", self.x_0)


class Linear:
    """x0-hat = 0.3 x + 0.1 + sin(40 t): linear in x, different at every time; keeps its outputs."""

    def __init__(self, process):
        self.process, self.outputs = process, []

    def __call__(self, x_t, t, condition=None):
        said = Prediction(self.process, t, x_t, "x0", 0.3 * x_t + 0.1 + math.sin(40 * t))
        self.outputs.append(said)
        return said


def no_noise():
    raise AssertionError("noise was drawn")


def noises(shape, seed=0):
    """A source of noise that remembers what it gave."""
    generator = torch.Generator().manual_seed(seed)
    given_out = []

    def draw():
        given_out.append(torch.randn(shape, dtype=torch.float64, generator=generator))
        return given_out[-1]

    return draw, given_out


# -- coefficient rules ------------------------------------------------------------------------------------------------


@given(st.sampled_from(list(ALL_SCHEDULES)), st.lists(st.floats(1e-3, 0.999), min_size=1, max_size=6, unique=True))
def test_ddim_with_full_noise_is_ancestral_sampling(name, times):
    """Song et al. 2021, section 4.1: eta = 1 is DDPM with beta-tilde. Coefficient by coefficient."""
    times = sorted({round(t, 3) for t in times}, reverse=True)
    process, grid = Process(ALL_SCHEDULES[name]), Grid(tuple(times))
    for mine, theirs in zip(
        DDIM(eta=1.0).table(process, grid).dense(), Ancestral().table(process, grid).dense(), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-8 * max(1, float(theirs.abs().max())))


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_ddim_keeps_the_marginals_whatever_its_noise(process, eta):
    """x_t ~ N(alpha_t x0, sigma_t^2) becomes x_s ~ N(alpha_s x0, sigma_s^2); sigma = eta sqrt(beta-tilde), eq. 16."""
    times = (0.9, 0.6, 0.3, 0.1)
    table = DDIM(eta).table(process, Grid(times))
    for t, s, row in zip(times, times[1:], table.rows, strict=False):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ([float(c) for c in process.scales(u)] for u in (t, s))
        noise = row.z[0] if eta else 0.0
        assert row.x[0] * alpha_t + row.m[0] == pytest.approx(alpha_s, rel=1e-12)
        assert (row.x[0] * sigma_t) ** 2 + noise**2 == pytest.approx(sigma_s**2, rel=1e-12)
        step_variance = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        assert noise**2 == pytest.approx(eta**2 * sigma_s**2 / sigma_t**2 * step_variance, rel=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_last_state_is_the_model_s_last_word_exactly(process, steps, eta):
    """Sigma is 0 there in closed form: no noise is left, in float32 too."""
    x_0 = torch.tensor([[0.7, -0.2], [0.1, 1.3]])
    for solver in (DDIM(eta), Ancestral(), Ancestral("beta")):
        draw, _ = noises((2, 2))
        model = Knows(process, x_0)
        assert torch.equal(run(solver.table(process, steps=steps), model, 3 * x_0.flip(0), draw), x_0)
        assert len(model.asked) == steps


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_ddim_carries_a_point_along_its_own_line(process, steps):
    """x_t = alpha x0 + sigma eps with both fixed goes to alpha_s x0 + sigma_s eps at every step."""
    x_0, eps = torch.tensor([[0.7, -0.2]]).double(), torch.tensor([[-0.4, 1.1]]).double()
    table = DDIM().table(process, steps=steps)
    seen = []
    alpha, sigma = process.scales(table.times[0])
    run(table, Knows(process, x_0), alpha * x_0 + sigma * eps, no_noise, watch=lambda i, x, p: seen.append(x))
    for t, x in zip(table.times, seen, strict=True):
        alpha, sigma = process.scales(t)
        assert torch.allclose(x, alpha * x_0 + sigma * eps, rtol=1e-10, atol=1e-12)


def test_ddim_of_a_point_is_exact_in_one_step(process):
    """Data that is one point (a mixture with a vanishing variance): one evaluation, whatever the noise."""
    point = Mixture([1.0], [[0.7, -0.2]], [1e-20])
    table = DDIM().table(process, steps=1)
    x = run(table, point.denoiser(process), torch.randn(5, 2, dtype=torch.float64), no_noise)
    assert torch.allclose(x, point.means.expand(5, 2), atol=1e-6)


def test_many_steps_of_ddim_are_the_flow_of_a_gaussian(process):
    """One Gaussian N(m, s^2): the ODE maps x to m + s (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2), in closed form."""
    m, s = 0.4, 0.6
    gaussian = Mixture([1.0], [[m]], [s**2])
    t = torch.linspace(1, 0, 501, dtype=torch.float64)[:-1] ** 2  # dense where the data is near
    grid = Grid(tuple(t.tolist()))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    alpha, sigma = (float(c) for c in process.scales(1.0))
    x_1 = alpha * m + math.hypot(alpha * s, sigma) * x
    end = run(DDIM().table(process, grid), gaussian.denoiser(process), x_1, no_noise)
    assert torch.allclose(end, m + s * x, atol=0.03)


@pytest.mark.parametrize("t", [2, 10, 500, 1000])
def test_a_row_of_ancestral_sampling_is_algorithm_2_of_ddpm(t):
    """1 / sqrt(alpha_t) (x_t - beta_t / sqrt(1 - abar_t) eps) + sqrt(beta_t) z, with eps written as x0."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    b, now = float(beta[t - 1]), float(abar[t - 1])
    grid = Grid((t / 1000, (t - 1) / 1000))
    row = Ancestral("beta").table(DDPM, grid).rows[0]
    x_t, x_0 = 0.9, -0.3
    eps = (x_t - math.sqrt(now) * x_0) / math.sqrt(1 - now)
    mean = (x_t - b / math.sqrt(1 - now) * eps) / math.sqrt(1 - b)
    assert row.x[0] * x_t + row.m[0] * x_0 == pytest.approx(mean, abs=1e-10)
    assert row.z[0] == pytest.approx(math.sqrt(b), rel=1e-8)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_ancestral_sampling_has_the_moments_of_the_data(variance, ring, dice):
    """A thousand steps with the exact denoiser, 3,000 samples: mean and covariance within 5 standard errors."""
    n = 3000
    x = run(
        Ancestral(variance).table(DDPM, steps=1000),
        ring.denoiser(DDPM),
        torch.randn(n, 2, dtype=torch.float64, generator=dice),
        lambda: torch.randn(n, 2, dtype=torch.float64, generator=dice),
    )
    outer = x.unsqueeze(-1) * x.unsqueeze(-2)
    second = torch.eye(2).double() * (1.4**2 / 2 + 0.15**2)  # eight even points of a circle, and the width of each
    assert bool((x.mean(0).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    assert bool(((outer.mean(0) - second).abs() < 5 * outer.std(0) / math.sqrt(n)).all())
    radius = x.norm(dim=1)
    assert float(radius.std()) == pytest.approx(0.15, abs=0.02)


def test_one_step_gives_the_mean_of_the_data_and_many_give_the_data(ring, dice):
    """Theory row 15: from pure noise, E[x0|x_1] is nearly the mean of all data."""
    x_1 = torch.randn(500, 2, dtype=torch.float64, generator=dice)
    one, many = (run(DDIM().table(DDPM, steps=k), ring.denoiser(DDPM), x_1, no_noise) for k in (1, 200))
    assert float(one.norm(dim=1).max()) < 0.1
    assert float((many.norm(dim=1) - 1.4).abs().mean()) < 0.2


def test_temperature_zero_walks_along_the_means():
    """Theory row 14: no noise is drawn, and what remains is the row's mean."""
    cold, warm = (Ancestral(temperature=k).table(DDPM, steps=9) for k in (0.0, 1.0))
    assert not cold.stochastic
    for a, b in zip(cold.rows, warm.rows, strict=True):
        assert (a.x, a.m, a.z) == (b.x, b.m, ())
    run(cold, Linear(DDPM), torch.ones(2, 2).double(), no_noise)


def test_temperature_multiplies_the_noise():
    half, whole = (Ancestral("beta", temperature=k).table(DDPM, steps=9) for k in (0.5, 1.0))
    assert torch.allclose(half.C, 0.5 * whole.C)


@pytest.mark.parametrize(("fraction", "like"), [(0.0, "beta_tilde"), (1.0, "beta"), (0.5, None)])
def test_a_learned_variance_lies_between_beta_tilde_and_beta(fraction, like):
    """On a log scale: half way is the geometric mean."""

    class Net(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.cat([0.1 * x, torch.full_like(x, 2 * fraction - 1)], 1)

    denoiser = Denoiser(Net(), DDPM, "x0", learned_variance=True)
    grid, x = Grid((0.8, 0.5)), torch.ones(4, 1, dtype=torch.float64)

    def after_one_step(variance):
        seen = []
        draw, out = noises((4, 1))
        run(Ancestral(variance).table(DDPM, grid), denoiser, x, draw, watch=lambda i, y, p: seen.append(y))
        return seen[1], out[0]

    learned, z = after_one_step("learned")
    (low, _), (high, _) = after_one_step("beta_tilde"), after_one_step("beta")
    mean = low - z * Ancestral().table(DDPM, grid).rows[0].z[0]
    std = ((low - mean) * (high - mean)).sqrt() if like is None else None
    truth = mean + std * z.sign() if like is None else {"beta_tilde": low, "beta": high}[like]
    assert torch.allclose(learned, truth, rtol=1e-9)


def test_a_learned_variance_needs_a_network_that_says_it(ring):
    with pytest.raises(ValueError, match="learned_variance=True"):
        ks.sample(ring.denoiser(DDPM), (2,), seeds=[0], solver=Ancestral("learned"), steps=5)


# -- tables -----------------------------------------------------------------------------------------------------------

DEEP = Table(
    (
        Row(0.9, x=0.9, m=0.2, z=0.3),
        Row(0.7, x=(0.8, -0.1), m=(0.3, 0.1), z=(0.2, 0.05)),
        Row(0.5, x=0.7, m=(0.0, 0.0, 0.4), z=(0.1, 0.0, -0.3)),
        Row(0.3, x=(0.0, 0.6), m=0.5),
        Row(0.1, x=(0.1, 0.0, 0.0, 0.2, 0.3), m=(0.5, 0.1, 0.0, 0.0, -0.2)),
    ),
)
GAPPED = Table(  # z_0 is used by the second row alone, and z_1 by no row
    (Row(0.9, x=0.9, m=0.1), Row(0.5, x=0.8, m=0.2, z=(0.0, 0.5)), Row(0.1, x=0.7, m=0.3, z=0.2))
)
RESUMED = Table(  # noise, then none, then a row that reaches back over the gap
    (Row(0.9, x=0.9, m=0.1, z=0.4), Row(0.5, x=0.8, m=0.2), Row(0.1, x=0.7, m=0.3, z=(0.2, 0.0, 0.6)))
)


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(DEEP, id="deep"),
        pytest.param(RESUMED, id="resumed"),
        pytest.param(Ancestral().table(DDPM, steps=6), id="ancestral"),
        pytest.param(DDIM(0.5).table(LINEAR, steps=6), id="ddim"),
        pytest.param(DDIM().table(LINEAR, steps=6), id="ode"),
    ],
)
@pytest.mark.parametrize("form", ["x0", "eps"])
def test_the_dense_table_is_what_the_executor_does(table, form):
    """X_{i+1} = a_i X_0 + sum B_ij m_j + sum C_ij z_j, with the outputs and noises of a run."""
    table = Table(table.rows, form)
    model, (draw, z) = Linear(LINEAR), noises((3, 2))
    x_init = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    states = []
    end = run(table, model, x_init, draw, watch=lambda i, x, p: states.append(x))
    states = [*states[1:], end]
    a, b, c = table.dense()
    assert (a.shape, b.shape, c.shape) == ((len(states),), (len(states),) * 2, (len(states),) * 2)
    assert torch.equal(table.a, a)
    assert torch.equal(table.B, b)
    assert torch.equal(table.C, c)
    assert float(b.triu(1).abs().max()) == float(c.triu(1).abs().max()) == 0
    drawn = iter(z)
    z = [next(drawn) if row.z else torch.zeros(3, 2).double() for row in table.rows]
    for i, x in enumerate(states):
        truth = a[i] * x_init
        for j in range(i + 1):
            truth = truth + b[i, j] * model.outputs[j].read(form) + c[i, j] * z[j]
        assert torch.allclose(x, truth, rtol=1e-10, atol=1e-12)


def test_a_noise_that_only_a_later_row_uses_is_drawn_for_it():
    """Exactly the noises with a column of C that is not zero: z_0 for the second row, z_2 for the third."""
    model, (draw, z) = Linear(LINEAR), noises((3, 2))
    x_init = torch.ones(3, 2, dtype=torch.float64)
    end = run(GAPPED, model, x_init, draw)
    a, b, c = GAPPED.dense()
    assert len(z) == int((c.abs().sum(0) > 0).sum()) == 2
    truth = a[2] * x_init + c[2, 0] * z[0] + c[2, 2] * z[1]
    for j in range(3):
        truth = truth + b[2, j] * model.outputs[j].x0
    assert torch.allclose(end, truth)


def test_a_deterministic_table_draws_no_noise():
    """A zero coefficient means that no noise is drawn: nobody has to remember to say so."""
    for solver in (DDIM(), Ancestral(temperature=0.0), Ancestral("learned", temperature=0.0)):
        table = solver.table(LINEAR, steps=5)
        assert not table.stochastic
        run(table, Linear(LINEAR), torch.ones(2, 2).double(), no_noise)


def test_the_last_step_draws_no_noise():
    draw, out = noises((1, 1))
    run(Ancestral().table(DDPM, steps=5), Linear(DDPM), torch.ones(1, 1).double(), draw)
    assert len(out) == 4


def test_a_run_keeps_only_the_history_that_it_needs():
    """While the last of 30 one-step rows runs, no early state is alive."""
    states, alive = [], []

    def watch(i, x, prediction):
        states.append(weakref.ref(x))
        alive.append(sum(ref() is not None for ref in states))

    x_init = torch.ones(2, 2).double()
    run(DDIM().table(LINEAR, steps=30), Knows(LINEAR, torch.zeros(2, 2).double()), x_init, no_noise, watch=watch)
    assert max(alive) <= 3  # the start, which the caller holds, this state, and the one before in its prediction


def test_a_row_reads_back_as_it_was_written():
    assert Row(0.7, x=0.5, m=(0.1, 0.0, 0.3, 0.0), z=0.0).history() == ((0.5,), (0.1, 0.0, 0.3), ())


def test_a_table_counts_its_evaluations():
    table = DDIM(0.5).table(DDPM, steps=7)
    assert table.evaluations == len(table.times) == len(table.rows) == 7
    assert table.stochastic


def test_a_transform_is_applied_to_every_x0(ring):
    """Clipped to [-0.1, 0.1] at each step, the last state is too."""
    asked = []

    def clip(x):
        asked.append(x)
        return x.clamp(-0.1, 0.1)

    x = ks.sample(ring.denoiser(LINEAR), (2,), seeds=range(8), solver=DDIM(), steps=5, transform=clip)
    assert len(asked) == 5
    assert float(x.abs().max()) <= 0.1 + 1e-7


def test_solvers_are_known_by_name():
    """Every name makes a solver without more words, and a table of as few steps as its order."""
    assert {"auto", "ddim", "ancestral", "dpm_solver++", "unipc"} <= set(SOLVERS)
    for name, kind in SOLVERS.items():
        solver = kind()
        assert type(solver) is kind, name
        assert solver.table(LINEAR, steps=solver.order).times[0] == 1.0


# -- the same table in every form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMS if form != "x0"])
@pytest.mark.parametrize(
    "table",
    [
        pytest.param(lambda p: DDIM().table(p, steps=6), id="ddim"),
        pytest.param(lambda p: Ancestral().table(p, steps=6), id="ancestral"),
        pytest.param(lambda p: AdamsBashforth(4, "flow").table(p, steps=7), id="adams-bashforth"),
        pytest.param(lambda p: UniPC(3, variable="eps").table(p, steps=6), id="unipc"),
        pytest.param(lambda p: RK4("v").table(p, steps=4), id="rk4"),
        pytest.param(lambda p: Table(DEEP.rows, "v"), id="deep"),
    ],
)
@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "sub_vp", "log_snr_line"))
def test_a_table_read_in_another_form_is_the_same_sampler(table, form, schedule):
    """Every state of the way, and back again: the numbers change, the trajectory does not."""
    process = Process(schedule)
    table = table(process)

    def trajectory(table, form):
        seen, (draw, _) = [], noises((3, 2))

        class Says(Linear):
            def __call__(self, x_t, t, condition=None):
                said = super().__call__(x_t, t)
                return Prediction(process, t, x_t, form, said.read(form))

        x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        end = run(table, Says(process), x, draw, watch=lambda i, x, p: seen.append(x))
        return torch.stack([*seen[1:], end])

    truth = trajectory(table, table.form)
    near = {"rtol": 1e-9, "atol": 1e-9 * max(1.0, float(truth.abs().max()))}
    assert torch.allclose(trajectory(table, form), truth, **near)
    assert torch.allclose(trajectory(table.read_as(form, process), form), truth, **near)
    assert torch.allclose(trajectory(table.read_as(form, process), "x0"), truth, **near)
    for mine, own in zip(table.read_as(form, process).read_as(table.form, process).dense(), table.dense(), strict=True):
        assert torch.allclose(mine, own, rtol=1e-8, atol=1e-9 * max(1.0, float(own.abs().max())))


def test_a_table_read_in_its_own_form_is_itself():
    table = DDIM().table(LINEAR, steps=3)
    assert table.read_as("x0", LINEAR) is table


def test_a_table_serves_processes_forms_and_precisions_in_turn():
    """What is made ready for one run is not used for another."""
    ve = Process(ALL_SCHEDULES["ve"])
    table = Table(DEEP.rows, "v")
    for _ in range(2):
        for process in (LINEAR, ve):
            for dtype in (torch.float32, torch.float64):
                for form in ("x0", "eps"):
                    x = torch.ones(2, 2, dtype=dtype)
                    fresh, kept = (run(t, Constant(process, form), x, zeros(x)) for t in (Table(DEEP.rows, "v"), table))
                    assert fresh.dtype == kept.dtype == dtype
                    assert torch.equal(fresh, kept)


class Constant:
    """A model that says 0.3 in its form."""

    def __init__(self, process, form):
        self.process, self.form = process, form

    def __call__(self, x_t, t, condition=None):
        return Prediction(self.process, t, x_t, self.form, torch.full_like(x_t, 0.3))


def zeros(like):
    return lambda: torch.zeros_like(like)


# -- the executor's memory --------------------------------------------------------------------------------------------


def by_hand(table, model, x, noise):
    """The recurrence, straight from its definition, with everything kept."""
    states, outputs, drawn = [x], [], []
    used = {i - k for i, row in enumerate(table.rows) for k, c in enumerate(row.history()[2]) if c}
    for i, row in enumerate(table.rows):
        outputs.append(model(states[-1], row.t).read(table.form).clone())
        drawn.append(noise() if i in used else torch.zeros_like(x))
        parts = zip(row.history(), (states, outputs, drawn), strict=True)
        states.append(sum((c * past[-1 - k] for part, past in parts for k, c in enumerate(part)), torch.zeros_like(x)))
    return states[-1]


class Returns(nn.Module):
    """A network that hands back its own input, or a view of it."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, t, condition=None):
        return self.how(x)


@pytest.mark.parametrize(
    "how", [lambda x: x, lambda x: x.view(x.shape), lambda x: x.flip(0)], ids=["itself", "view", "new"]
)
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("form", ["x0", "eps"])
def test_memory_that_is_used_again_is_never_still_needed(how, watched, form):
    """Deep histories of states, outputs and noises, with and without a watch, against keeping everything."""
    model = Denoiser(Returns(how), LINEAR, form)
    ddim = DDIM().table(LINEAR, steps=9)
    tables = (DEEP, GAPPED, RESUMED, AdamsBashforth(4).table(LINEAR, steps=9), UniPC(3).table(LINEAR, steps=9), ddim)
    for table in tables:
        x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        start = x.clone()
        watch = (lambda i, x, p: None) if watched else None
        mine, theirs = run(table, model, x, noises((3, 2))[0], watch=watch), by_hand(table, model, x, noises((3, 2))[0])
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-11)
        assert torch.equal(x, start)


def test_a_transform_that_returns_its_input_is_safe_too():
    """x0 is the network's output, which is its input, which the transform hands on."""
    model, table = Denoiser(Returns(lambda x: x), LINEAR, "x0"), AdamsBashforth(4, "x0").table(LINEAR, steps=9)
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        run(table, model, x, transform=lambda x_0: x_0), by_hand(table, model, x, no_noise), rtol=1e-10
    )


def test_what_a_watch_was_shown_stays_as_it_was():
    seen, copies = [], []

    def watch(i, x, prediction):
        seen.append((x, prediction.value))
        copies.append((x.clone(), prediction.value.clone()))

    run(AdamsBashforth(3).table(LINEAR, steps=12), Linear(LINEAR), torch.ones(2, 2).double(), watch=watch)
    for pair, copy in zip(seen, copies, strict=True):
        for now, then in zip(pair, copy, strict=True):
            assert torch.equal(now, then)


@pytest.mark.parametrize("solver", [DDIM(), AdamsBashforth(4), UniPC(2), RK4()], ids=repr)
def test_states_live_in_the_same_few_places(solver):
    """Where the states of 60 evaluations lie: no more places than the deepest row looks back, and two to work in."""
    table = solver.table(LINEAR, steps=60)
    places = []

    class Looks(Constant):
        def __call__(self, x_t, t, condition=None):
            places.append(x_t.data_ptr())
            return super().__call__(x_t, t)

    run(table, Looks(LINEAR, "x0"), torch.ones(2, 2).double())
    deepest = max(len(row.history()[0]) for row in table.read_as("x0", LINEAR).rows)
    assert len(places) >= 60
    assert len(set(places)) <= deepest + 2


@pytest.mark.parametrize("solver", [DDIM(0.5), AdamsBashforth(3), EDMHeun(), UniPC(3)], ids=repr)
def test_times_as_numbers_and_as_tensors_are_the_same(solver, ring):
    """The executor asks with numbers, whose coefficients are computed once; a tensor goes the long way."""
    model = ring.denoiser(LINEAR)

    class Tensors:
        process = LINEAR

        def __call__(self, x_t, t, condition=None):
            return model(x_t, torch.full((len(x_t),), t, dtype=torch.float64))

    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = solver.table(LINEAR, steps=7)
    mine, theirs = (run(table, said, x, noises((4, 2))[0]) for said in (model, Tensors()))
    assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("solver", [kind() for kind in SOLVERS.values()], ids=repr)
def test_noise_is_drawn_exactly_where_it_is_used(solver, ring):
    """As many draws as columns of C that are not zero: none for the ODE."""
    table = solver.table(LINEAR, steps=8)
    draw, given_out = noises((4, 2))
    run(table, ring.denoiser(LINEAR), torch.ones(4, 2).double(), draw)
    assert len(given_out) == int((table.C.abs().sum(0) > 0).sum())
    assert bool(given_out) == table.stochastic


# -- one seed for each sample -----------------------------------------------------------------------------------------


def test_noise_is_a_function_of_its_seed_alone():
    """Bit for bit: alone, in any batch, in any order, at every draw."""
    alone = {seed: Noise([seed], (2, 3)) for seed in (5, 9, 2**62)}
    batch = Noise([9, 5, 7, 2**62], (2, 3))
    for _ in range(4):
        together = batch.draw()
        for k, seed in ((0, 9), (1, 5), (3, 2**62)):
            assert torch.equal(together[k], alone[seed].draw()[0])


def test_noise_is_standard_normal_and_new_for_every_seed_and_draw():
    """4,000 seeds, two draws: mean 0, variance 1, no correlation; 5 standard errors."""
    noise = Noise(range(4000), (1,), torch.float64)
    first, second = noise.draw()[:, 0], noise.draw()[:, 0]
    for z in (first, second, first * second, first[1:] * first[:-1]):
        assert abs(float(z.mean())) < 5 / math.sqrt(3999)
    assert float(first.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / 4000))


@pytest.mark.parametrize("solver", [DDIM(), DDIM(0.5), Ancestral("beta")])
def test_a_sample_is_a_function_of_its_seed(solver, ring):
    """The same bits in a batch of the same shape, and otherwise the same to rounding."""

    def draw(seeds, **options):
        return ks.sample(ring.denoiser(DDPM), (2,), seeds=seeds, solver=solver, steps=9, dtype=torch.float64, **options)

    first = draw([3, 1, 4, 15])
    assert torch.equal(first, draw([3, 1, 4, 15]))
    assert torch.equal(first[[2, 0]], draw([4, 3, 9, 2])[:2])
    assert torch.allclose(first[3:], draw([15]), rtol=1e-10)
    assert torch.allclose(first, draw([3, 1, 4, 15], batch_size=3), rtol=1e-10)


def test_different_seeds_give_different_samples(ring):
    x = ks.sample(ring.denoiser(DDPM), (2,), seeds=range(50), steps=9)
    assert len({tuple(row) for row in x.tolist()}) == 50


def test_sampling_begins_where_the_process_ends():
    """Variance exploding: noise of standard deviation 80, not 1."""
    process = Process(ALL_SCHEDULES["ve"])
    seen = []

    class Watches(Knows):
        def __call__(self, x_t, t, condition=None):
            seen.append(x_t)
            return super().__call__(x_t, t, condition)

    ks.sample(Watches(process, torch.zeros(2000, 1)), (1,), seeds=range(2000), steps=1, batch_size=2000)
    assert float(seen[0].std()) == pytest.approx(80, rel=5 / math.sqrt(4000))


def test_progress_is_told_after_each_batch(ring):
    told = []
    ks.sample(ring.denoiser(DDPM), (2,), seeds=range(5), steps=2, batch_size=2, progress=lambda *p: told.append(p))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_each_sample_has_its_own_condition():
    """The conditions follow their seeds through the batches."""

    class Echo(nn.Module):
        def forward(self, x, t, condition=None):
            return condition[:, None].to(x).expand_as(x)

    model, seeds = Denoiser(Echo(), DDPM, "x0"), range(5)
    x = ks.sample(model, (2,), seeds=seeds, solver=DDIM(), steps=3, condition=torch.arange(5), batch_size=2)
    assert x.tolist() == [[float(k)] * 2 for k in range(5)]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must lie in 1 to 1000, got 0"),
        ({"steps": 1001}, "this model was made with 1000 steps: steps must lie in 1 to 1000, got 1001"),
        ({}, "either a grid of times or steps="),
        ({"steps": 5, "grid": Grid((1.0,))}, "either a grid of times or steps="),
        ({"steps": 5, "table": DDIM().table(DDPM, steps=5)}, "drop solver, steps and grid"),
        ({"solver": DDIM(), "table": DDIM().table(DDPM, steps=5)}, "drop solver, steps and grid"),
        ({"steps": 5, "seeds": []}, "at least one seed"),
        ({"steps": 5, "seeds": [1, 2, 1]}, "its own seed; repeated: 1"),
        ({"steps": 5, "seeds": [-1]}, r"from 0 to 2\^63 - 1, got -1"),
        ({"steps": 5, "seeds": [2**63]}, r"from 0 to 2\^63 - 1"),
        ({"steps": 5, "seeds": [0.5]}, "a seed is a whole number"),
        ({"steps": 5, "condition": torch.zeros(2)}, "one condition for each seed expected: 1 seeds, 2 conditions"),
        ({"steps": 5, "batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_sampling_that_cannot_be_says_why(options, words, ring):
    with pytest.raises(ValueError, match=words):
        ks.sample(ring.denoiser(DDPM), (2,), **{"seeds": [0], **options})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDIM(eta=-0.1), r"eta must lie in \[0, 1\].*got -0.1"),
        (lambda: DDIM(eta=1.5), r"eta must lie in \[0, 1\]"),
        (lambda: DDIM(eta=float("nan")), r"eta must lie in \[0, 1\]"),
        (lambda: Ancestral("gamma"), "variance must be one of beta_tilde, beta, learned"),
        (lambda: Ancestral(temperature=-1.0), "temperature must be at least 0"),
        (lambda: Ancestral(temperature=float("nan")), "temperature must be at least 0"),
        (lambda: Ancestral(temperature=float("inf")).table(DDPM, steps=3), "finite"),
        (lambda: Table((Row(0.5, x=1.0),), "noise"), "form must be one of x0, eps"),
        (lambda: Table(()), "at least one row"),
        (lambda: Table((Row(1.5, x=1.0),)), "row 0 evaluates at time 1.5"),
        (lambda: Table((Row(0.5, x=(1.0, 0.5)),)), "row 0 reaches 2 evaluations back, but only 1"),
        (lambda: Table((Row(0.5, x=1.0), Row(0.1, m=(0.1, 0.1, 0.1)))), "row 1 reaches 3"),
        (lambda: Table((Row(0.5, x=float("nan")),)), "row 0 holds a coefficient that is not finite"),
        (lambda: Table((Row(0.5, m=float("inf")),)), "row 0 holds a coefficient that is not finite"),
        (
            lambda: Table((Row(0.5, x=1.0, z=0.1, z_upper=float("nan")),)),
            "row 0 holds a coefficient that is not finite",
        ),
        (lambda: Table((Row(0.5, x=1.0, z=0.0, z_upper=0.2),)), "z_upper"),
    ],
)
def test_a_table_that_cannot_be_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_seeds_may_be_any_whole_numbers():
    assert check_seeds(range(3)) == [0, 1, 2]
    assert check_seeds(torch.tensor([4, 2])) == [4, 2]
    assert check_seeds(iter([2**63 - 1])) == [2**63 - 1]


def test_sampling_and_the_bound_switch_dropout_off_and_leave_it_as_it_was():
    """A network left in training mode gives the answers of evaluation mode, and is in training mode afterwards."""
    torch.manual_seed(0)
    network = ks.networks.MLP((2,), width=16, depth=1, dropout=0.5)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    denoiser = ks.Denoiser(network, ks.Process(ks.schedules.Cosine()), predicts="v")
    x_0 = torch.randn(8, 2)

    def answers():
        samples = ks.sample(denoiser, (2,), seeds=range(4), steps=5)
        return samples, elbo(denoiser, x_0, steps=5, variance="beta").total

    denoiser.eval()
    by_hand = answers()
    denoiser.train()
    network.blocks[0].eval()
    for own, hand in zip(answers(), by_hand, strict=True):
        assert torch.equal(own, hand)
    assert denoiser.training
    assert not network.blocks[0].training

"""diffusers' scheduler configurations: our tables against diffusers' own loops, and what is refused.

Where nothing else is said diffusers computes in float64 too (:func:`doubled`), and both agree to 1e-8 or not at all.
"""

import contextlib
import inspect
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import kuosan as ks
from kuosan.bridge.fields import DEFAULTS, DIFFERENCES, NO_EFFECT
from kuosan.bridge.schedulers import read_scheduler
from kuosan.solvers import DDIM, run

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:__array__ implementation")

DDPM, DDIM_, PNDM = "DDPMScheduler", "DDIMScheduler", "PNDMScheduler"
EULER, DPM, UNIPC = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
ANCESTRAL, FLOW = "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
#: Stable Diffusion's betas.
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
EPS, X0, V = ({"prediction_type": p} for p in ("epsilon", "sample", "v_prediction"))
LEADING, LINSPACE, TRAILING = ({"timestep_spacing": s} for s in ("leading", "linspace", "trailing"))
ZERO_SNR, SIGMA_MIN = {"rescale_betas_zero_snr": True}, {"final_sigmas_type": "sigma_min"}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
RULES = {"levels": {}, "karras": KARRAS, "exponential": EXPONENTIAL}


@contextlib.contextmanager
def doubled():
    """Inside, whoever asks for float32 gets float64: diffusers' own code, without its rounding."""
    single, default = (torch.float32, np.float32), torch.get_default_dtype()
    torch.float32, np.float32 = torch.float64, np.float64
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, np.float32 = single
        torch.set_default_dtype(default)


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INWARD, OUTWARD, CLOCK = 0.6 * numbers(1, 3, 16), 0.4 * numbers(2, 16, 6), numbers(3, 16)


class Network(nn.Module):
    """A smooth function of x (B, 3, D) and the timestep, large enough to be clipped; (B, 6, D) with a variance."""

    def __init__(self, timestep=lambda t: t, out=3):
        super().__init__()
        self.timestep, self.out = timestep, out

    def forward(self, x, t, condition=None):
        told = torch.as_tensor(self.timestep(t), dtype=torch.float64).reshape(-1, 1, 1) / 1000
        y = torch.tanh(x.double().movedim(1, -1) @ INWARD + told * CLOCK) @ OUTWARD
        return y.movedim(-1, 1)[:, : self.out].to(x.dtype)


def theirs(name, steps, config, *, step=None, timesteps=None, out=3):
    """diffusers' loop from a fixed start, in the precision that it computes in: (the sample, the timesteps, JSON)."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps, **(timesteps or {}))
    given = dict(step or {})
    if "generator" in inspect.signature(scheduler.step).parameters:
        given["generator"] = torch.Generator().manual_seed(5)
    x = numbers(4, 4, 3, 2).to(torch.float32) * getattr(scheduler, "init_noise_sigma", 1.0)
    network = Network(out=out)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, **given).prev_sample
    return x, scheduler.timesteps.double().numpy(), json.loads(scheduler.to_json_string())


def ours(scheduler, steps, dtype=torch.float64, **given):
    """The same start, noise and network through our table: (the sample, the timesteps)."""
    table = scheduler.table(steps, **given)
    network = Network(scheduler.timestep, out=6 if scheduler.learned_variance else 3)
    denoiser = ks.Denoiser(network, scheduler.process, scheduler.predicts, learned_variance=scheduler.learned_variance)
    generator = torch.Generator().manual_seed(5)
    start = scheduler.start(steps) * numbers(4, 4, 3, 2).to(dtype)
    x = run(
        table,
        denoiser,
        start,
        lambda: torch.randn(4, 3, 2, generator=generator, dtype=dtype),
        transform=scheduler.transform,
    )
    return x, np.array([scheduler.timestep(t) for t in table.times])


def both(name, steps, config, *, step=None, timesteps=None, out=3, **given):
    """(their sample, ours), computed in float64, after checking that both networks were told the same times."""
    with doubled():
        expected, told, saved = theirs(name, steps, config, step=step, timesteps=timesteps, out=out)
    found, times = ours(read_scheduler(saved), steps, **given)
    np.testing.assert_allclose(times, told, atol=1e-6)
    return expected, found


def agree(expected, found, tolerance=1e-8):
    assert bool(expected.isfinite().all())
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) < tolerance * scale


def spelled(*parts):
    return "-".join(str(v) for part in parts for v in (part.values() if isinstance(part, dict) else [part]))


# -- every class against diffusers' own loop ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", [EPS, X0, V], ids=spelled)
@pytest.mark.parametrize("spacing", [LEADING, LEADING | {"steps_offset": 1}, LINSPACE, TRAILING], ids=spelled)
@pytest.mark.parametrize("betas", [LATENT, COSINE, {"beta_schedule": "sigmoid"}], ids=lambda b: b["beta_schedule"])
@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
def test_ddpm(form, spacing, betas, clip):
    agree(*both(DDPM, 7, form | spacing | betas | {"clip_sample": clip, "clip_sample_range": 0.8}))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_variances(variance):
    agree(*both(DDPM, 10, {"variance_type": variance}))


def test_ddpm_learned_variance():
    agree(*both(DDPM, 10, {"variance_type": "learned_range"}, out=6))


@pytest.mark.parametrize("form", [EPS, X0, V], ids=spelled)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("betas", [LATENT, {"clip_sample": False}, COSINE | {"clip_sample": False}], ids=spelled)
def test_ddim(form, to_one, offset, eta, betas):
    """On leading grids; see below for the others, and for clipping, where diffusers is told to do it right here."""
    config = form | betas | {"set_alpha_to_one": to_one, "steps_offset": offset}
    agree(*both(DDIM_, 9, config, step={"eta": eta, "use_clipped_model_output": True}, eta=eta))


@pytest.mark.parametrize(("name", "spacing"), [(DDIM_, TRAILING), (DDPM, TRAILING), (DDPM, LINSPACE)], ids=spelled)
@pytest.mark.parametrize("form", [X0, V], ids=spelled)
def test_without_any_signal_at_the_start(name, spacing, form):
    step = {"use_clipped_model_output": True} if name == DDIM_ else None
    agree(*both(name, 10, form | spacing | ZERO_SNR, step=step))


@pytest.mark.parametrize("form", [EPS, V], ids=spelled)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 12])
def test_pndm(form, to_one, offset, steps):
    config = {"skip_prk_steps": True, "set_alpha_to_one": to_one, "steps_offset": offset}
    agree(*both(PNDM, steps, LATENT | form | config))


@pytest.mark.parametrize("form", [EPS, V], ids=spelled)
@pytest.mark.parametrize("spacing", [LEADING | {"steps_offset": 1}, LINSPACE, TRAILING], ids=spelled)
@pytest.mark.parametrize("end", [{}, SIGMA_MIN], ids=["to data", "to sigma_min"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("betas", [LATENT, COSINE, LATENT | ZERO_SNR], ids=["latent", "cosine", "zero snr"])
def test_euler(form, spacing, end, rule, betas):
    agree(*both(EULER, 9, form | spacing | end | rule | betas))


@pytest.mark.parametrize("form", [EPS, V], ids=spelled)
@pytest.mark.parametrize("spacing", [LEADING | {"steps_offset": 1}, LINSPACE, TRAILING], ids=spelled)
@pytest.mark.parametrize("betas", [LATENT, COSINE, LATENT | ZERO_SNR], ids=["latent", "cosine", "zero snr"])
def test_euler_ancestral(form, spacing, betas):
    agree(*both(ANCESTRAL, 9, form | spacing | betas))


@pytest.mark.parametrize("form", [EPS, X0, V], ids=spelled)
@pytest.mark.parametrize("spacing", [LEADING | {"steps_offset": 1}, LINSPACE, TRAILING], ids=spelled)
@pytest.mark.parametrize(
    ("algorithm", "order"),
    [
        (a, o)
        for a in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        for o in ((1, 2) if a[0] == "s" else (1, 2, 3))
    ],
)
@pytest.mark.parametrize("rule", [{}, {"solver_type": "heun"}], ids=["midpoint", "heun"])
def test_dpm_solver(form, spacing, algorithm, order, rule):
    end = {} if algorithm.endswith("++") and form is V else SIGMA_MIN
    config = form | spacing | LATENT | rule | end | {"solver_order": order, "algorithm_type": algorithm}
    agree(*both(DPM, 7, config))


@pytest.mark.parametrize("steps", [6, 16])
@pytest.mark.parametrize("end", [{}, SIGMA_MIN, SIGMA_MIN | {"euler_at_final": True}], ids=spelled)
@pytest.mark.parametrize("low", [True, False])
def test_dpm_solver_at_its_end(steps, end, low):
    agree(*both(DPM, steps, LATENT | end | {"solver_order": 3, "lower_order_final": low}))


@pytest.mark.parametrize("betas", [LATENT, COSINE], ids=["latent", "cosine"])
@pytest.mark.parametrize("end", [{}, SIGMA_MIN], ids=["to data", "to sigma_min"])
@pytest.mark.parametrize("rule", [KARRAS, EXPONENTIAL, {"use_lu_lambdas": True}], ids=spelled)
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_on_levels(betas, end, rule, order):
    agree(*both(DPM, 8, betas | end | rule | {"solver_order": order}))


@pytest.mark.parametrize("spacing", [LEADING, LINSPACE, TRAILING], ids=spelled)
def test_dpm_solver_with_the_log_snr_clipped(spacing):
    agree(*both(DPM, 10, COSINE | spacing | {"lambda_min_clipped": -3.0}))


def test_dpm_solver_with_zero_snr():
    agree(*both(DPM, 10, V | TRAILING | ZERO_SNR | LATENT))
    agree(*both(DPM, 10, V | TRAILING | ZERO_SNR))  # whose levels do not fall from 998 to 999


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("variable", [True, False], ids=["x0", "eps"])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize("corrector", [[], [0, 2]], ids=["corrected", "not at 0 and 2"])
@pytest.mark.parametrize("low", [True, False])
def test_unipc(order, variable, b, corrector, low):
    config = {"solver_order": order, "predict_x0": variable, "solver_type": b, "lower_order_final": low}
    agree(*both(UNIPC, 7, LATENT | SIGMA_MIN | config | {"disable_corrector": corrector}))


@pytest.mark.parametrize("form", [EPS, X0, V], ids=spelled)
@pytest.mark.parametrize("spacing", [LEADING | {"steps_offset": 1}, LINSPACE, TRAILING], ids=spelled)
@pytest.mark.parametrize("end", [{}, SIGMA_MIN], ids=["to data", "to sigma_min"])
def test_unipc_on_timesteps(form, spacing, end):
    agree(*both(UNIPC, 12, LATENT | form | spacing | end))


@pytest.mark.parametrize("end", [{}, SIGMA_MIN], ids=["to data", "to sigma_min"])
@pytest.mark.parametrize("rule", [KARRAS, EXPONENTIAL, KARRAS | {"sigma_min": 0.1, "sigma_max": 9.0}], ids=spelled)
def test_unipc_on_levels(end, rule):
    agree(*both(UNIPC, 8, LATENT | end | rule))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("rule", [*RULES.values(), {"shift_terminal": 0.1}], ids=[*RULES, "terminal"])
@pytest.mark.parametrize("noisy", [False, True], ids=["ode", "stochastic"])
def test_flow(shift, rule, noisy):
    agree(*both(FLOW, 8, {"shift": shift, "stochastic_sampling": noisy} | rule))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flow_shifted_by_the_length_of_the_image(kind):
    """mu is that of diffusers' pipelines (calculate_shift): a line through (256, 0.5) and (4096, 1.15)."""
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    config = {"use_dynamic_shifting": True, "time_shift_type": kind}
    agree(*both(FLOW, 8, config, timesteps={"mu": mu}, tokens=1024))


@pytest.mark.parametrize(("name", "more"), [(DDPM, {}), (DPM, {}), (DPM, {"algorithm_type": "dpmsolver"}), (UNIPC, {})])
@pytest.mark.parametrize("largest", [1.0, 1.4, 3.0, 0.6])
def test_dynamic_thresholding(name, more, largest):
    config = LATENT | more | {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": largest}
    agree(*both(name, 9, config | (SIGMA_MIN if more else {})))


def test_unipc_on_the_noise_takes_no_notice_of_thresholding():
    agree(*both(UNIPC, 9, LATENT | SIGMA_MIN | {"predict_x0": False, "thresholding": True}))


def test_a_mean_with_a_learned_variance():
    config = LATENT | {"variance_type": "learned_range"}
    with doubled():
        expected, _, saved = theirs(DPM, 9, config, out=6)
    scheduler = read_scheduler(saved)
    assert scheduler.learned_variance
    agree(expected, ours(scheduler, 9)[0])


def test_betas_given_as_a_list():
    betas = np.linspace(0.001, 0.2, 50).tolist()
    agree(*both(DDPM, 7, {"trained_betas": betas, "num_train_timesteps": 50}))


#: What is found in well-known folders.
FOLDERS = {
    "stable diffusion 1": (PNDM, LATENT | {"skip_prk_steps": True, "steps_offset": 1, "clip_sample": False}),
    "stable diffusion xl": (
        EULER,
        LATENT | LEADING | {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True},
    ),
    "sdxl turbo": (ANCESTRAL, LATENT | TRAILING),
    "stable diffusion 2": (DDIM_, LATENT | V | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": (DDPM, {"clip_sample": True, "variance_type": "fixed_large"}),
    "stable diffusion 3": (FLOW, {"shift": 3.0}),
    "dpm-solver++": (DPM, LATENT | KARRAS),
    "unipc": (UNIPC, LATENT),
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_in_single_precision_samples_agree_to_its_rounding(folder):
    """diffusers as it is, and our float64 table on float32 tensors."""
    name, config = FOLDERS[folder]
    foreign = {k: v for k, v in config.items() if k not in DEFAULTS[name]}
    expected, told, saved = theirs(name, 10, {k: v for k, v in config.items() if k not in foreign})
    found, times = ours(read_scheduler(saved | foreign), 10, torch.float32)
    agree(expected, found, 1e-5)
    np.testing.assert_allclose(times, told, atol=1e-3)


def test_sample_takes_all_of_it():
    """Truth: the executor with the same start, drawn by hand."""
    scheduler = read_scheduler({"_class_name": EULER} | TRAILING | LATENT)
    denoiser = ks.Denoiser(Network(scheduler.timestep), scheduler.process, scheduler.predicts)
    table, start = scheduler.table(5), scheduler.start(5)
    assert start == pytest.approx(float(scheduler.process.sigma(1.0)), abs=1e-12)
    found = ks.sample(denoiser, (3, 2), seeds=[3, 8], table=table, transform=scheduler.transform, temperature=start)
    noise = ks.solvers.Noise([3, 8], (3, 2)).draw()
    assert torch.allclose(found, run(table, denoiser, start * noise), atol=1e-6)


# -- the process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in DEFAULTS if n != FLOW])
@pytest.mark.parametrize("betas", [{}, LATENT, COSINE], ids=["linear", "latent", "cosine"])
def test_time_i_of_n_is_timestep_i_minus_1(name, betas):
    """Truth: alphas_cumprod of diffusers, float32."""
    more = {"skip_prk_steps": True} if name == PNDM else {}
    with doubled():
        cumprod = getattr(diffusers, name)(**betas, **more).alphas_cumprod
    scheduler = read_scheduler({"_class_name": name} | betas | more)
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(scheduler.process.alpha(times) ** 2, cumprod, rtol=1e-10, atol=0)
    assert scheduler.timestep(0.4) == pytest.approx(399)


def test_a_flow_is_the_straight_line():
    scheduler = read_scheduler({"_class_name": FLOW})
    assert (scheduler.predicts, scheduler.timestep(0.25)) == ("flow", 250)
    assert [float(c) for c in scheduler.process.scales(0.25)] == [0.75, 0.25]


# -- where diffusers is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [LINSPACE, TRAILING], ids=spelled)
def test_ddim_ends_each_step_where_the_next_begins(spacing):
    """Truth: DDIM's formula by hand on the grid's own timesteps; diffusers goes to timestep - N // steps."""
    config, steps = LATENT | spacing | {"clip_sample": False}, 7
    expected, found = both(DDIM_, steps, config)
    scheduler = read_scheduler({"_class_name": DDIM_} | config)
    _, told = ours(scheduler, steps)
    bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    x, network = numbers(4, 4, 3, 2), Network()
    for t, s in zip(told, [*told[1:], None], strict=True):
        a, b = bar[round(t)], (bar[round(s)] if s is not None else torch.ones(()))
        eps = network(x, t)
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    agree(x, found)
    assert float((expected - found).abs().max()) > 1e-4


def test_pndm_ends_each_step_where_the_next_begins():
    """diffusers does only where its stride is the grid's: trailing, with steps that divide N."""
    agree(*both(PNDM, 10, LATENT | TRAILING | {"skip_prk_steps": True}))
    expected, found = both(PNDM, 7, LATENT | TRAILING | {"skip_prk_steps": True})
    assert bool(found.isfinite().all())
    assert float((expected - found).abs().max()) > 1e-4


def test_the_noise_is_that_of_the_clipped_x0():
    """diffusers clips x0 and leaves the noise, unless step() is told otherwise; where nothing is clipped all agree."""
    expected, found = both(DDIM_, 9, LATENT | {"clip_sample_range": 0.5})
    assert float((expected - found).abs().max()) > 1e-3
    agree(*both(DDIM_, 9, LATENT | {"clip_sample_range": 100.0}))


def test_the_last_step_of_fixed_large_adds_no_noise():
    """Truth: x0-hat of the last evaluation; diffusers adds noise of that timestep's variance where it is not 0."""
    config = {"variance_type": "fixed_large", "clip_sample": False} | TRAILING
    expected, found = both(DDPM, 10, config)
    *_, last = read_scheduler({"_class_name": DDPM} | config).table(10).rows
    assert not last.z
    assert float((expected - found).abs().max()) > 1e-2


def test_fixed_large_log_is_fixed_large():
    expected, found = both(DDPM, 10, {"variance_type": "fixed_large_log"})
    assert bool(expected.isnan().any())
    agree(ours(read_scheduler({"_class_name": DDPM, "variance_type": "fixed_large"}), 10)[0], found)


@pytest.mark.parametrize("config", [{"solver_type": "bh1"}, {"predict_x0": False}, {"lower_order_final": False}])
def test_unipc_ends_on_x0(config):
    """Truth: DPM-Solver's first-order step to the data, which is the model's x0."""
    with doubled():
        expected, _, saved = theirs(UNIPC, 5, LATENT | config | {"disable_corrector": [3]})
    assert not bool(expected.isfinite().all())
    scheduler = read_scheduler(saved)
    *_, last = scheduler.table(5).read_as("x0", scheduler.process).rows
    assert last.m == pytest.approx((1.0,), abs=1e-9)
    assert bool(ours(scheduler, 5)[0].isfinite().all())


@pytest.mark.parametrize("name", [DDPM, DDIM_, EULER, ANCESTRAL, DPM, UNIPC])
def test_trailing_has_as_many_steps_as_asked_for(name):
    """1000 - 61 (1000 / 61) is not 0 in float64, and diffusers then goes on to timestep -1."""
    scheduler = getattr(diffusers, name)(**TRAILING)
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 62
    assert read_scheduler({"_class_name": name} | TRAILING).table(61).evaluations == 61


def test_an_exponential_grid_begins_at_the_timestep_of_its_level():
    """diffusers tells its network 998 there, for 999 less a rounding error of float32 is cut off."""
    _, told, saved = theirs(DPM, 8, LATENT | EXPONENTIAL)
    assert told[0] == 998
    assert read_scheduler(saved).table(8).times[0] == 1.0


def test_a_timestep_may_come_twice():
    """diffusers looks the first timestep up, finds the second of its kind, and runs out of levels at the end."""
    with pytest.raises((IndexError, AssertionError)):
        theirs(UNIPC, 20, COSINE | KARRAS)
    scheduler = read_scheduler({"_class_name": UNIPC} | COSINE | KARRAS)
    found, told = ours(scheduler, 20)
    assert told[0] == told[1] == pytest.approx(999)
    assert bool(found.isfinite().all())


def test_every_difference_is_said():
    assert all(isinstance(what, str) and len(what) > 30 for what in DIFFERENCES.values())


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_class(name):
    """Truth: the signature of the class in the installed diffusers."""
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert DEFAULTS[name] == {k: p.default for k, p in signature.items() if k != "self"}


#: Values with which a field says something else, and what it takes for it to say anything.
OTHER = {
    "num_train_timesteps": (500, {}),
    "beta_start": (0.0005, {}),
    "beta_end": (0.03, {}),
    "beta_schedule": ("scaled_linear", {}),
    "trained_betas": ([0.01] * 1000, {}),
    "prediction_type": ("v_prediction", {}),
    "steps_offset": (1, LEADING),
    "rescale_betas_zero_snr": (True, LEADING),
    "thresholding": (True, {}),
    "dynamic_thresholding_ratio": (0.5, {"thresholding": True}),
    "sample_max_value": (2.0, {"thresholding": True}),
    "clip_sample": (False, {}),
    "clip_sample_range": (2.0, {}),
    "solver_order": (1, {}),
    "lower_order_final": (False, {"solver_order": 3}),
    "final_sigmas_type": ("sigma_min", {}),
    "sigma_min": (0.5, KARRAS),
    "sigma_max": (5.0, KARRAS),
    "euler_at_final": (True, SIGMA_MIN | {"lower_order_final": False}),
    "lambda_min_clipped": (-1.0, {}),
    "disable_corrector": ([1], {}),
    "shift": (2.0, {}),
    "shift_terminal": (0.2, {}),
    "base_shift": (0.6, {"use_dynamic_shifting": True}),
    "max_shift": (1.2, {"use_dynamic_shifting": True}),
    "base_image_seq_len": (128, {"use_dynamic_shifting": True}),
    "max_image_seq_len": (2048, {"use_dynamic_shifting": True}),
    "time_shift_type": ("linear", {"use_dynamic_shifting": True}),
    "algorithm_type": ("sde-dpmsolver++", {}),
    "variance_type": ("learned_range", {}),
    "solver_p": ("something", {}),
    "interpolation_type": ("log_linear", {}),
    "timestep_type": ("continuous", V),
}


@pytest.mark.parametrize(("name", "field"), [(n, f) for n in DEFAULTS for f in DEFAULTS[n]])
def test_every_field_is_honoured_refused_or_known_to_change_nothing(name, field):
    default = DEFAULTS[name][field]
    value, needed = OTHER.get(field, (None, {}))
    if value is None:
        choices = {"timestep_spacing": "trailing", "solver_type": {DPM: "heun", UNIPC: "bh1"}.get(name)}
        value = choices.get(field, not default)
        if value == default:
            value = "leading"
    base = {"_class_name": name} | ({"skip_prk_steps": True} if name == PNDM and field != "skip_prk_steps" else {})
    base |= {k: v for k, v in needed.items() if k in DEFAULTS[name] and (name == FLOW or k != "use_dynamic_shifting")}

    def said(config):
        scheduler = read_scheduler(config)
        dynamic = name == FLOW and scheduler.config["use_dynamic_shifting"]
        table = scheduler.table(8, tokens=1000) if dynamic else scheduler.table(8)
        facts = (scheduler.predicts, scheduler.transform, scheduler.learned_variance, scheduler.start(8))
        return table, facts, scheduler.process.log_snr(0.5)

    if field == "skip_prk_steps":
        with pytest.raises(ValueError, match=field):
            read_scheduler(base)
        return
    before = said(base)
    try:
        after = said(base | {field: value})
    except ValueError as error:
        assert field in str(error)  # noqa: PT017
        return
    assert before != after or field in NO_EFFECT


def test_absent_fields_and_those_of_other_classes_change_nothing():
    """Truth: diffusers' own JSON, which holds every field; a PNDM's file as an Euler's."""
    short, full = read_scheduler({"_class_name": DDIM_}), theirs(DDIM_, 5, {})[2]
    assert short.table(5) == read_scheduler(full | {"_use_default_values": ["clip_sample"]}).table(5)
    foreign = {"skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False, "_diffusers_version": "0.6.0"}
    assert read_scheduler({"_class_name": EULER} | foreign).table(5) == read_scheduler({"_class_name": EULER}).table(5)


def test_solver_types_of_other_classes_are_replaced_as_diffusers_does():
    for name, theirs_, ours_ in ((DPM, "bh2", "midpoint"), (UNIPC, "midpoint", "bh2")):
        given, meant = (read_scheduler({"_class_name": name, "solver_type": s}) for s in (theirs_, ours_))
        assert given.table(8) == meant.table(8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "HeunDiscreteScheduler"}, "these schedulers are read: DDPMScheduler"),
        ({}, "_class_name is None"),
        ({"_class_name": DDPM, "flavour": 1}, "unknown flavour; its fields are beta_end"),
        ({"_class_name": DDPM, "_private": 1}, "unknown _private"),
        ({"_class_name": DDPM, "beta_schedule": "laplace"}, "beta_schedule may be linear.*sigmoid, got 'laplace'"),
        ({"_class_name": DDIM_, "beta_schedule": "sigmoid"}, "beta_schedule may be"),
        ({"_class_name": DDIM_, "prediction_type": "flow_prediction"}, "prediction_type may be epsilon"),
        ({"_class_name": DDIM_, "timestep_spacing": "log"}, "timestep_spacing may be"),
        ({"_class_name": DDPM, "variance_type": "learned"}, "fixed_small runs its mean"),
        ({"_class_name": PNDM}, "set skip_prk_steps true"),
        ({"_class_name": PNDM, "skip_prk_steps": True, "prediction_type": "sample"}, "may be epsilon, v_prediction"),
        ({"_class_name": ANCESTRAL} | X0, "may be epsilon, v_prediction"),
        ({"_class_name": EULER, "use_beta_sigmas": True}, "use_karras_sigmas or use_exponential_sigmas"),
        ({"_class_name": EULER, "interpolation_type": "log_linear"}, "timesteps of other levels"),
        ({"_class_name": EULER, "timestep_type": "continuous"} | V, "only discrete is read"),
        ({"_class_name": EULER} | KARRAS | EXPONENTIAL, "use_karras_sigmas and use_exponential_sigmas"),
        ({"_class_name": DPM, "use_flow_sigmas": True}, "read as FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": DPM, "solver_order": 4}, "solver_order may be 1, 2, 3"),
        ({"_class_name": DPM, "algorithm_type": "dpmsolver"}, "set final_sigmas_type sigma_min"),
        ({"_class_name": DPM, "thresholding": True} | KARRAS, "set one of them false"),
        ({"_class_name": UNIPC, "solver_p": "DDIM"}, "leave it out"),
        ({"_class_name": UNIPC, "use_dynamic_shifting": True}, "belongs to use_flow_sigmas"),
        ({"_class_name": UNIPC, "disable_corrector": 1}, "a list of step numbers"),
        ({"_class_name": FLOW, "invert_sigmas": True}, "let the network take 1 - t"),
        ({"_class_name": FLOW, "shift_terminal": 1.5}, "between 0 and 1"),
        ({"_class_name": FLOW, "use_dynamic_shifting": True, "base_shift": None}, "needs base_shift"),
        ({"_class_name": FLOW, "shift": -1.0}, "shift is a positive number"),
        ({"_class_name": DDPM, "num_train_timesteps": 0}, "a whole number from 1"),
        ({"_class_name": DDPM, "num_train_timesteps": 10.5}, "a whole number from 1"),
        ({"_class_name": DDPM, "steps_offset": -1}, "a whole number from 0"),
        ({"_class_name": DDPM, "beta_start": "0.1"}, "beta_start is a number, got '0.1'"),
        ({"_class_name": DDPM, "beta_end": 1.5}, "betas lie between 0 and 1"),
        ({"_class_name": DDPM, "clip_sample": 1}, "clip_sample is true or false"),
        ({"_class_name": DDPM, "clip_sample_range": 0}, "clip_sample_range is a positive number"),
        ({"_class_name": DDPM, "dynamic_thresholding_ratio": 2}, r"lies in \[0, 1\]"),
        ({"_class_name": DDPM, "trained_betas": [0.1, 0.2]}, "2 trained_betas, but num_train_timesteps is 1000"),
        ({"_class_name": DDPM, "trained_betas": "linear"}, "a list of numbers"),
        ({"_class_name": DDPM, "beta_start": math.nan}, "beta_start is a number"),
        ({"_class_name": DDPM, "num_train_timesteps": math.inf}, "a whole number from 1"),
        ({"_class_name": FLOW, "shift": math.inf}, "shift is a positive number"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        read_scheduler(config)


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
def test_what_diffusers_has_wrong_is_refused(algorithm):
    """Its third-order term of the SDE does not vanish with the step: -alpha D_2 (or there is none at all)."""
    config = {"algorithm_type": algorithm, "solver_order": 3} | SIGMA_MIN
    with pytest.raises(ValueError, match="set solver_order 2"):
        read_scheduler({"_class_name": DPM} | config)
    h = torch.tensor(1e-3, dtype=torch.float64)
    assert float((1 - torch.exp(-2 * h) - 2 * h) / (2 * h) ** 2 - 0.5) == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({"_class_name": DDPM}, {"steps": 0}, "a whole number from 1"),
        ({"_class_name": DDPM}, {"steps": 2.0}, "a whole number from 1"),
        ({"_class_name": DDPM}, {"steps": 1001}, "steps is at most that"),
        ({"_class_name": DDIM_, "steps_offset": 1}, {"steps": 1000}, "go past timestep 999"),
        ({"_class_name": DPM}, {"steps": 1000}, "do not fall at every step"),
        ({"_class_name": DPM} | COSINE | {"lambda_min_clipped": 99.0}, {"steps": 5}, "go past|do not fall"),
        ({"_class_name": EULER, "sigma_min": 0.001} | KARRAS | SIGMA_MIN, {"steps": 5}, "do not fall"),
        ({"_class_name": DDIM_} | TRAILING | ZERO_SNR, {"steps": 5}, "timestep 999 has no signal"),
        ({"_class_name": DDPM}, {"steps": 5, "eta": 0.5}, "eta belongs to DDIMScheduler"),
        ({"_class_name": DDIM_}, {"steps": 5, "eta": 1.5}, r"eta must lie in \[0, 1\]"),
        ({"_class_name": DDPM}, {"steps": 5, "tokens": 100}, "drop tokens="),
        ({"_class_name": FLOW, "use_dynamic_shifting": True}, {"steps": 5}, "give tokens="),
        ({"_class_name": FLOW, "shift_terminal": 0.1}, {"steps": 1}, "take at least 2 steps"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_tables_that_there_are_not_are_refused(config, given, message):
    scheduler = read_scheduler(config)
    with pytest.raises(ValueError, match=message):
        scheduler.table(**given)


def test_a_ddim_table_is_that_of_our_ddim_on_the_same_grid():
    """Truth: :class:`kuosan.solvers.DDIM` on the model's own process, where levels and times are the same."""
    scheduler = read_scheduler({"_class_name": DDIM_} | LATENT | TRAILING)
    found = scheduler.table(10)
    direct = DDIM().table(scheduler.process, ks.Grid(found.times)).read_as("eps", scheduler.process)
    for a, b in zip(found.rows, direct.rows, strict=True):
        assert a.x == pytest.approx(b.x, abs=1e-9)
        assert a.m == pytest.approx(b.m, abs=1e-9)

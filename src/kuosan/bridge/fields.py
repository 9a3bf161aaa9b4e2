"""The fields of diffusers' schedulers: what each may hold, what it is when absent, what to do about other values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_LEADING = {"timestep_spacing": "leading"}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_MULTISTEP = {
    "solver_order": 2,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}

#: The classes that are read, and what a key that is absent means: the defaults of each class in diffusers 0.42.1.
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _BETAS | _LEADING | _ZERO_SNR | _THRESHOLD | _CLIP | {"variance_type": "fixed_small"},
    "DDIMScheduler": _BETAS | _LEADING | _ZERO_SNR | _THRESHOLD | _CLIP | {"set_alpha_to_one": True},
    "PNDMScheduler": _BETAS | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": _BETAS
    | _ZERO_SNR
    | _SIGMAS
    | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"}
    | {"sigma_min": None, "sigma_max": None},
    "EulerAncestralDiscreteScheduler": _BETAS | _ZERO_SNR,
    "DPMSolverMultistepScheduler": _BETAS
    | _ZERO_SNR
    | _THRESHOLD
    | _SIGMAS
    | _MULTISTEP
    | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
    | {"use_lu_lambdas": False, "lambda_min_clipped": -math.inf, "variance_type": None},
    "UniPCMultistepScheduler": _BETAS
    | _ZERO_SNR
    | _THRESHOLD
    | _SIGMAS
    | _MULTISTEP
    | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None}
    | {"sigma_min": None, "sigma_max": None, "shift_terminal": None},
    "FlowMatchEulerDiscreteScheduler": _SIGMAS
    | {"num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": None, "invert_sigmas": False}
    | {"use_dynamic_shifting": False, "time_shift_type": "exponential", "stochastic_sampling": False}
    | {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
}

#: Fields that change no numbers, and why. A field of another of these classes is one more: diffusers takes no notice of
#: it, and writes it only so that one file can be opened as several classes (Stable Diffusion's PNDM has a clip_sample).
NO_EFFECT = {
    "_diffusers_version": "which version wrote the file",
    "_use_default_values": "which values were not given: they are the class's defaults",
    "_ignore_files": "for loading, not for sampling",
    "flow_shift": "only with use_flow_sigmas, which is refused",
    "time_shift_type": "only with use_dynamic_shifting of FlowMatchEulerDiscreteScheduler, or use_flow_sigmas",
    "use_dynamic_shifting": "of DPMSolverMultistepScheduler: only with use_flow_sigmas",
}

#: Where diffusers 0.42.1 is wrong, and what the tables here do instead.
DIFFERENCES = {
    "DDIM, PNDM: the step before": "taken to be timestep - N // steps, which on linspace grids, and on trailing ones "
    "whose steps do not divide N, is no timestep of the grid; here each step ends where the next begins",
    "DDIM: clipping": "unless step() is told use_clipped_model_output=True, x0 is clipped and the noise is not, and "
    "they no longer add up to x_t; here the noise is always that of the clipped x0",
    "DDPM: noise at the end": "where the last timestep is not 0, fixed_large adds the variance of that whole step to "
    "the finished sample (and learned_range some of it); here the last step is its mean",
    "DDPM: fixed_large_log": "takes the root of a logarithm: NaN; here it is fixed_large, of which it is the log",
    "DPM-Solver: learned variances": "cuts three channels off for the mean; here half of them, whatever their number",
    "UniPC: the step to the data": "0 times infinity, NaN, with bh1, with predict_x0 false, or above order 1 when "
    "lower_order_final is false; here it is x0-hat",
    "final_sigmas_type sigma_min": "with Karras's or exponential levels the last step has no length, and above order "
    "2 is 0 / 0 when lower_order_final is false; here the state stays",
    "trailing": "of some numbers of steps (61 of 1000) rounding makes one more, at timestep -1; here there are as many "
    "as asked for",
    "DPM-Solver, UniPC: a timestep twice": "of 20 Karras or exponential levels of the cosine schedule the first have "
    "one timestep; diffusers begins at the second of them and ends with an error; here all are taken in turn",
    "DPM-Solver, UniPC: times of exponential levels (and of Karras's, of the cosine schedule)": "cut off to whole "
    "timesteps, so that float32 tells the network 998 where the level is that of 999; here it is told 999",
    "rescale_betas_zero_snr": "with linear betas what stands for no signal, 2^-24, is more than was left a timestep "
    "before; here tables have the level of diffusers, and the process one that falls",
    "float32": "betas and noise levels are rounded to it, 1e-6 to 5e-5 of a sample; here they are float64",
}

_FALSE = (False, None)
#: The values that a field may have; elsewhere a number, or a class's own under (class, field).
CHOICES: dict[str | tuple[str, str], tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    ("DDPMScheduler", "beta_schedule"): ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    ("PNDMScheduler", "prediction_type"): ("epsilon", "v_prediction"),
    ("EulerAncestralDiscreteScheduler", "prediction_type"): ("epsilon", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"),
    ("DPMSolverMultistepScheduler", "variance_type"): (None, "learned", "learned_range"),
    "solver_order": (1, 2, 3),
    ("UniPCMultistepScheduler", "solver_order"): (1, 2, 3, 4),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "timestep_type": ("discrete", "continuous"),
    "interpolation_type": ("linear",),
    "skip_prk_steps": (True,),
    "use_beta_sigmas": _FALSE,
    "use_flow_sigmas": _FALSE,
    "invert_sigmas": _FALSE,
    "solver_p": (None,),
    ("UniPCMultistepScheduler", "use_dynamic_shifting"): _FALSE,
    ("UniPCMultistepScheduler", "shift_terminal"): (None,),
}
#: What to do about a value that is refused.
HINTS = {
    "variance_type": "a network that predicts the variance itself is not read; fixed_small runs its mean",
    "interpolation_type": "log_linear tells the network timesteps of other levels; use_exponential_sigmas does not",
    "skip_prk_steps": "the Runge-Kutta start is not read: set skip_prk_steps true, or _class_name DDIMScheduler",
    "use_beta_sigmas": "use_karras_sigmas or use_exponential_sigmas instead",
    "use_flow_sigmas": "a flow is read as FlowMatchEulerDiscreteScheduler, with shift for flow_shift",
    "invert_sigmas": "time runs from noise, 1, to data, 0, here: let the network take 1 - t",
    "solver_p": "the predictor is UniPC's own; leave it out",
    "shift_terminal": "it belongs to use_flow_sigmas; leave it out",
    "use_dynamic_shifting": "it belongs to use_flow_sigmas; leave it out",
}
#: Fields that hold whole numbers, with the least that they may be; and which of the numbers may be None, infinite, ...
WHOLE = {"num_train_timesteps": 1, "steps_offset": 0, "base_image_seq_len": 1, "max_image_seq_len": 1}
OPEN = ("sigma_min", "sigma_max", "shift_terminal", "base_shift", "max_shift")
UNBOUNDED = ("lambda_min_clipped", "sample_max_value")
POSITIVE = ("clip_sample_range", "sample_max_value", "shift", "sigma_min", "sigma_max")


def settings(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(the class, every field of it) of a configuration.

    Raises:
        ValueError: an unknown class or field, or a value that is not honoured.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in DEFAULTS:
        raise ValueError(
            f"_class_name is {name!r}; these schedulers are read: {', '.join(DEFAULTS)}. Many others open the same "
            "files: set _class_name to one of these"
        )
    defaults = DEFAULTS[name]
    known = {"_class_name", *NO_EFFECT, *(field for fields in DEFAULTS.values() for field in fields)}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; its fields are {', '.join(sorted(defaults))}")
    unset = config.get("_use_default_values") or ()
    values = defaults | {k: v for k, v in config.items() if k in defaults and k not in unset}
    for field, value in values.items():
        _check(name, field, value)
    _check_together(name, values)
    return name, values


def _check(name: str, field: str, value: Any) -> None:
    """Raises ValueError for a value that is not honoured, by the name of its field."""
    choices = CHOICES.get((name, field), CHOICES.get(field))
    if choices is not None:
        if not any(value is c or (value == c and type(value) is type(c)) for c in choices):
            hint = f"; {HINTS[field]}" if field in HINTS else ""
            raise ValueError(f"{name}: {field} may be {', '.join(map(str, choices))}, got {value!r}{hint}")
        return
    default = DEFAULTS[name][field]
    number = isinstance(value, Real) and not isinstance(value, bool)
    number = number and (math.isfinite(value) or (field in UNBOUNDED and not math.isnan(value)))
    if field in WHOLE:
        fine = number and isinstance(value, int) and value >= WHOLE[field]
        wanted = f"a whole number from {WHOLE[field]}"
    elif field == "trained_betas":
        fine = value is None or (isinstance(value, list | tuple) and all(isinstance(b, Real) for b in value))
        wanted = "a list of numbers, or null"
    elif field == "disable_corrector":
        fine = isinstance(value, list | tuple) and all(isinstance(i, int) and i >= 0 for i in value)
        wanted = "a list of step numbers"
    elif isinstance(default, bool):
        fine, wanted = value is None or isinstance(value, bool), "true or false"
    else:
        fine = (field in OPEN and value is None) or (number and (field not in POSITIVE or value > 0))
        wanted = "a positive number" if field in POSITIVE else "a number"
    if not fine:
        raise ValueError(f"{name}: {field} is {wanted}, got {value!r}")


def _check_together(name: str, values: dict[str, Any]) -> None:
    """Raises ValueError for values that are each fine and together are not; replaces what diffusers replaces."""
    laid_out = [f for f in ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas") if values.get(f)]
    if len(laid_out) > 1:
        raise ValueError(f"{name}: one rule lays out the noise levels, got {' and '.join(laid_out)}: set one false")
    if laid_out and values.get("thresholding"):
        raise ValueError(
            f"{name}: with {laid_out[0]} the network is told a rounded time, at which thresholding would read x0: set "
            "one of them false"
        )
    if values.get("timestep_type") == "continuous" and values["prediction_type"] == "v_prediction":
        raise ValueError(f"{name}: timestep_type continuous tells the network log(sigma) / 4; only discrete is read")
    if not 0 <= values.get("dynamic_thresholding_ratio", 0) <= 1:
        raise ValueError(
            f"{name}: dynamic_thresholding_ratio lies in [0, 1], got {values['dynamic_thresholding_ratio']}"
        )
    betas, n = values.get("trained_betas"), values["num_train_timesteps"]
    if betas is not None and len(betas) != n:
        raise ValueError(f"{name}: {len(betas)} trained_betas, but num_train_timesteps is {n}")
    if values.get("use_dynamic_shifting") and None in (values.get("base_shift", 0), values.get("max_shift", 0)):
        raise ValueError(f"{name}: use_dynamic_shifting needs base_shift and max_shift")
    if values.get("shift_terminal") is not None and not 0 < values["shift_terminal"] < 1:
        raise ValueError(f"{name}: shift_terminal lies between 0 and 1, got {values['shift_terminal']}")
    if name == "DPMSolverMultistepScheduler":
        # what diffusers itself puts in their place, so that other classes' files open
        values["algorithm_type"] = {"deis": "dpmsolver++"}.get(values["algorithm_type"], values["algorithm_type"])
        values["solver_type"] = values["solver_type"] if values["solver_type"] == "heun" else "midpoint"
        if values["algorithm_type"].startswith("sde") and values["solver_order"] == 3:
            raise ValueError(
                f"{name}: {values['algorithm_type']} of solver_order 3 has a wrong sign in diffusers, or no rule: "
                "set solver_order 2"
            )
        if not values["algorithm_type"].endswith("++") and values["final_sigmas_type"] == "zero":
            raise ValueError(
                f"{name}: {values['algorithm_type']} cannot step to the data: set final_sigmas_type sigma_min, or take "
                "algorithm_type dpmsolver++"
            )
    elif name == "UniPCMultistepScheduler":
        values["solver_type"] = values["solver_type"] if values["solver_type"] == "bh1" else "bh2"

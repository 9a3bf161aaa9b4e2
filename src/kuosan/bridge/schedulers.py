r"""diffusers' scheduler configurations as a process, a form of prediction and tables. Does not import diffusers.

    scheduler = read_scheduler(json.loads(Path("scheduler/scheduler_config.json").read_text()))
    denoiser = ks.Denoiser(network, scheduler.process, scheduler.predicts)
    ks.sample(denoiser, shape, seeds=..., table=scheduler.table(20), transform=scheduler.transform,
              temperature=scheduler.start(20))

``kuosan.bridge.fields`` says which fields there are, and where diffusers 0.42.1 is wrong and what is done instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kuosan.bridge import steps as rules
from kuosan.bridge.fields import settings
from kuosan.process import Process
from kuosan.schedules import RectifiedFlow, from_alpha_bar
from kuosan.solvers.table import Table
from kuosan.solvers.transforms import Clip


@dataclass(frozen=True)
class Threshold:
    r"""Dynamic thresholding as diffusers has it: Imagen's (arXiv 2205.11487, sec. 2.3), with an upper bound as well.

    .. math:: \hat x_0 \leftarrow \mathrm{clip}(\hat x_0, -s, s) / s,
        \qquad s = \min(\max(1,\ \text{the quantile of } |\hat x_0| \text{ within the sample}),\ \text{largest})

    With the default of diffusers, largest = 1, that is clipping.
    """

    quantile: float
    largest: float

    def __call__(self, x_0: Tensor) -> Tensor:
        each = [torch.quantile(one, self.quantile) for one in x_0.abs().flatten(1)]  # which refuses large batches
        s = torch.stack(each).clamp(1, None).clamp(None, self.largest)
        s = s.reshape(-1, *(1,) * (x_0.ndim - 1))
        return x_0.clamp(-s, s) / s


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers, read.

    Args:
        name: of its class.
        config: every field of that class, with its default where the file has none.
        process: VP with a table of as many times as training had steps, where time i / N is timestep i - 1; or, for
            flow matching, the straight line, where time t is timestep N t.
        predicts: what its network says: "eps", "x0", "v" or "flow".
        transform: of x0-hat, for ``sample(transform=...)``; None for none.
        learned_variance: whether the network says the variance too, in as many channels again.
    """

    name: str
    config: Mapping[str, Any]
    process: Process
    predicts: str
    transform: Callable[[Tensor], Tensor] | None
    learned_variance: bool

    def table(self, steps: int, *, eta: float = 0.0, tokens: int | None = None) -> Table:
        """What diffusers does after ``set_timesteps(steps)``, step for step, as numbers.

        The model is evaluated at the times of the timesteps that diffusers tells its network. Between whole timesteps
        (Euler; Karras's levels) these are not always the times of the noise levels, so that the table is in the form
        that the network predicts, in which a row holds the level and its time is only told.

        Args:
            steps: ``num_inference_steps``. PNDM evaluates once more.
            eta: DDIM's own, which its ``step`` takes: 1 is ancestral sampling.
            tokens: the length of the image as a sequence, from which use_dynamic_shifting takes its shift.

        Raises:
            ValueError: steps that this scheduler cannot take, eta or tokens that it does not know, or no tokens where
                it needs them.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is a whole number from 1, got {steps!r}")
        if eta and self.name != "DDIMScheduler":
            raise ValueError(f"eta belongs to DDIMScheduler; {self.name} has its own noise or none")
        if (tokens is not None) != bool(self.config.get("use_dynamic_shifting") and self._flow):
            raise ValueError(
                f"tokens, the length of the image as a sequence, goes with use_dynamic_shifting of a flow: "
                f"{'give' if tokens is None else 'drop'} tokens="
            )
        if self._flow:
            return rules.flow_table(self.config, steps, tokens)
        return rules.table(self.name, self.config, self.predicts, steps, eta)

    def start(self, steps: int) -> float:
        """The standard deviation that diffusers gives the noise at the start, ``sample(temperature=...)``.

        1 but for Euler on linspace and trailing grids, which starts from the noise alone: sigma_1, a little under 1.
        """
        if self.name not in rules.EULER or self.config["timestep_spacing"] == "leading":
            return 1.0
        rho = float(rules.levels(self.name, self.config, steps).rho[0])
        return rho / math.hypot(rho, 1)

    def timestep(self, t: Any) -> Any:
        """The timestep that diffusers tells a network at time t: a number, or a tensor of t's shape."""
        return t * self.config["num_train_timesteps"] - (0 if self._flow else 1)

    @property
    def _flow(self) -> bool:
        return self.name == "FlowMatchEulerDiscreteScheduler"


def read_scheduler(config: Mapping[str, Any]) -> Scheduler:
    """A scheduler's configuration, as its JSON holds it.

    Raises:
        ValueError: an unknown class or field, or a value that is not honoured; the message says what to do.
    """
    name, values = settings(config)
    if "beta_schedule" not in values:
        return Scheduler(name, values, Process(RectifiedFlow()), "flow", None, False)
    alpha_bar = rules.alpha_bar(name, values)
    if values.get("rescale_betas_zero_snr") and len(alpha_bar) > 1:
        # what stands for no signal may be more than there was a timestep before
        alpha_bar[-1] = torch.minimum(alpha_bar[-1], alpha_bar[-2] / 2)
    process = Process(from_alpha_bar(alpha_bar))
    predicts = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[values["prediction_type"]]
    learned = values.get("variance_type") in ("learned", "learned_range")
    return Scheduler(name, values, process, predicts, _transform(values), learned)


def _transform(values: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    if values.get("thresholding") and values.get("predict_x0", True):  # UniPC on the noise takes no notice of it
        return Threshold(values["dynamic_thresholding_ratio"], values["sample_max_value"])
    if values.get("clip_sample"):
        return Clip(-values["clip_sample_range"], values["clip_sample_range"])
    return None

"""Kuosan's tables, networks and autoencoders as components of diffusers' pipelines. Imports diffusers.

import kuosan.bridge.components                       # diffusers asks for it: it imports no module by itself
pipe = DiffusionPipeline.from_pretrained("exported")  # what `kuosan export` wrote
pipe.scheduler = kuosan.bridge.scheduler_of("runs/x", steps=8)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kuosan.bridge.models import Autoencoder, Clock, Network, Pixels, TextNetwork, Words, form_of
from kuosan.bridge.schedulers import Threshold
from kuosan.process import Process, expand
from kuosan.solvers import Clip, DynamicThreshold, Row, Table

__all__ = [
    "Autoencoder",
    "Clock",
    "Network",
    "Pixels",
    "TableScheduler",
    "TableSchedulerOutput",
    "TextNetwork",
    "Words",
    "form_of",
]

#: What diffusers calls the forms that it knows.
PREDICTION_TYPES = {"x0": "sample", "eps": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}
FORMS = {name: form for form, name in PREDICTION_TYPES.items()}
TRANSFORMS: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in (Clip, DynamicThreshold, Threshold)}


@dataclass
class TableSchedulerOutput(BaseOutput):
    """The next state, and x0-hat as the step took it: both (B, ...)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class TableScheduler(SchedulerMixin, ConfigMixin):
    """Tables of Kuosan, one for each number of evaluations, as a scheduler of diffusers. Made by :meth:`of`.

    All that it does is in its configuration, as plain numbers; it saves and loads like any other scheduler.

    Args:
        tables: by number of evaluations: ``form``, ``start`` (the standard deviation of the noise at the start) and
            ``rows``, each with its time t, its coefficients x, m and z, and the process's alpha and sigma at t.
        prediction_type: of the network: "epsilon", "sample", "v_prediction" or "flow_prediction".
        num_train_timesteps: N.
        flow: whether timesteps are N t, as diffusers' flows have it, and not N t - 1.
        transform: of x0-hat: the name and the settings of Clip, DynamicThreshold or Threshold; None for none.

    Raises:
        ValueError: no tables, or an unknown prediction_type or transform.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        tables: dict[str, dict[str, Any]] | None = None,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        flow: bool = False,
        transform: dict[str, Any] | None = None,
    ):
        if not tables:
            raise ValueError("a TableScheduler is made of tables: kuosan.bridge.scheduler_of(run, steps=8) makes one")
        if prediction_type not in FORMS:
            raise ValueError(f"prediction_type must be one of {', '.join(FORMS)}, got {prediction_type!r}")
        self._clock, self._form = Clock(num_train_timesteps, flow), FORMS[prediction_type]
        self._transform = None if transform is None else _transform(transform)
        self._tables = {int(count): _Ready(Table.from_json(table), table) for count, table in tables.items()}
        self._now: _Ready | None = None
        self._begin()
        first = next(iter(self._tables.values()))
        self.timesteps = self._timesteps(first, None)  # of the first, until set_timesteps says which

    @classmethod
    def of(
        cls,
        tables: Sequence[Table],
        process: Process,
        predicts: str,
        transform: Callable[[Tensor], Tensor] | None = None,
        starts: Sequence[float] | None = None,
    ) -> TableScheduler:
        """The scheduler of some tables, for a network that predicts "x0", "eps", "v" or "flow".

        Args:
            starts: of each table, the standard deviation of the noise at the start in the prior's; default 1.

        Raises:
            ValueError: another form; a table whose noise is not a number; a transform other than clipping and
                thresholding; noise predicted where there is no signal.
        """
        if predicts not in PREDICTION_TYPES:
            raise ValueError(f"diffusers knows networks that predict {', '.join(PREDICTION_TYPES)}, not {predicts!r}")
        if transform is not None and not isinstance(transform, tuple(TRANSFORMS.values())):  # type: ignore[arg-type]
            raise ValueError(f"a scheduler may transform x0 by {', '.join(TRANSFORMS)}, got {transform!r}")
        named = None if transform is None else {"name": type(transform).__name__, **asdict(transform)}  # type: ignore[call-overload]
        clock = Clock.of(process)
        form = "x0" if named else predicts
        written = {
            str(table.evaluations): _written(table, process, form, start)
            for table, start in zip(tables, starts or (1.0,) * len(tables), strict=True)
        }
        return (
            cls(  # by keyword: what is given by place, diffusers takes to be a default, and from_config leaves it out
                tables=written,
                prediction_type=PREDICTION_TYPES[predicts],
                num_train_timesteps=clock.steps,
                flow=clock.flow,
                transform=named,
            )
        )

    def __len__(self) -> int:
        return self._clock.steps

    @property
    def init_noise_sigma(self) -> float:
        """What noise of variance 1 is multiplied by at the start."""
        return (self._now or next(iter(self._tables.values()))).start

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Take the table of so many evaluations, and begin it.

        Raises:
            ValueError: there is none.
        """
        if num_inference_steps not in self._tables:
            there = ", ".join(map(str, sorted(self._tables)))
            raise ValueError(
                f"this scheduler has tables of {there} evaluations: num_inference_steps is one of them, got "
                f"{num_inference_steps}"
            )
        self._now = self._tables[num_inference_steps]
        self.num_inference_steps = num_inference_steps
        self.timesteps = self._timesteps(self._now, device)
        self._begin()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: networks are given the state itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TableSchedulerOutput | tuple[Tensor, Tensor]:
        """The next state from the network's output at this one.

        Args:
            generator: of the noise, or one for each sample.

        Raises:
            ValueError: a step out of order, after the last or before set_timesteps; an output of another shape.
        """
        row, i = self._expected(timestep), self._done
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the network's output has shape {tuple(model_output.shape)} and the sample {tuple(sample.shape)}: "
                "of a network that predicts its variance too, pass the first half"
            )
        assert self._now is not None
        ready, kind = self._now, torch.promote_types(sample.dtype, torch.float32)
        x, output = sample.to(kind), model_output.to(kind)
        p, q = _to_x0(self._form, *ready.scales[i])
        x_0 = output if self._form == "x0" else p * x + q * output
        if self._transform is not None:
            output = x_0 = self._transform(x_0)
        past = self._past
        past[0].insert(0, x)
        past[1].insert(0, output)
        noise = randn_tensor(x.shape, generator, x.device, kind) if i in ready.drawn else torch.zeros(())
        past[2].insert(0, noise)
        total = torch.zeros_like(x)
        for terms, values, depth in zip(row.history(), past, ready.depths, strict=True):
            for c, value in zip(terms, values, strict=False):
                if c:
                    total.add_(value, alpha=c)
            del values[depth:]
        self._done += 1
        total, x_0 = total.to(sample.dtype), x_0.to(sample.dtype)
        return TableSchedulerOutput(total, x_0) if return_dict else (total, x_0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at timesteps of a table, of shape () or (B,).

        Raises:
            ValueError: a timestep that is in none of the tables.
        """
        known = {
            self._clock.timestep(row.t): scales
            for ready in self._tables.values()
            for row, scales in zip(ready.table.rows, ready.scales, strict=True)
        }
        found = []
        for asked in torch.as_tensor(timesteps, dtype=torch.float64).flatten().tolist():
            nearest = min(known, key=lambda one: abs(one - asked))
            if abs(nearest - asked) > 1e-3:
                raise ValueError(f"timestep {asked:g} is in none of these tables; the nearest is {nearest:g}")
            found.append(known[nearest])
        alpha, sigma = torch.tensor(found, dtype=torch.float64).unbind(1)
        return expand(alpha, original_samples) * original_samples + expand(sigma, noise) * noise

    def _begin(self) -> None:
        self._done = 0
        self._past: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    def _timesteps(self, ready: _Ready, device: torch.device | str | None) -> Tensor:
        told = [self._clock.timestep(t) for t in ready.table.times]
        kind = torch.int64 if all(one.is_integer() for one in told) else torch.float64
        if kind is torch.float64 and device is not None and torch.device(device).type == "mps":
            kind = torch.float32  # which is all that it has
        return torch.tensor(told, dtype=kind, device=device)

    def _expected(self, timestep: Any) -> Row:
        if self._now is None:
            raise ValueError("call set_timesteps before the first step: it says which table is taken")
        i, rows = self._done, self._now.table.rows
        if i == len(rows):
            raise ValueError(f"all {i} steps are done: call set_timesteps to begin again")
        expected = self._clock.timestep(rows[i].t)
        if abs(float(timestep) - expected) > 1e-3:
            raise ValueError(
                f"step {i + 1} of {len(rows)} is at timestep {expected:g}, got {float(timestep):g}: a table is taken "
                "in order from its start, each step once; set_timesteps begins it again"
            )
        return rows[i]


class _Ready:
    """A table with what each step needs to know of it."""

    def __init__(self, table: Table, written: Mapping[str, Any]):
        self.table, self.start = table, float(written["start"])
        self.scales = [(float(row["alpha"]), float(row["sigma"])) for row in written["rows"]]
        histories = [row.history() for row in table.rows]
        self.depths = [max(len(parts[kind]) for parts in histories) for kind in range(3)]
        self.drawn = {i - k for i, (_, _, z) in enumerate(histories) for k, c in enumerate(z) if c}


def _written(table: Table, process: Process, form: str, start: float) -> dict[str, Any]:
    plain = table.read_as(form, process).to_json()
    for row in plain["rows"]:
        row["alpha"], row["sigma"] = process.at(Process.scales, row["t"])
    return plain | {"start": start * float(process.prior(table.times[0]).std)}


def _transform(config: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in TRANSFORMS:
        raise ValueError(f"a transform of x0 is one of {', '.join(TRANSFORMS)}, got {name!r}")
    return TRANSFORMS[name](**settings)


def _to_x0(form: str, alpha: float, sigma: float) -> tuple[float, float]:
    r"""(p, q) of :math:`\hat x_0 = p x + q F` where F = a x0 + b eps: b / (alpha b - sigma a) and -sigma / (same)."""
    a, b = {"x0": (1.0, 0.0), "eps": (0.0, 1.0), "v": (-sigma, alpha), "flow": (-1.0, 1.0)}[form]
    determinant = alpha * b - sigma * a
    return b / determinant, -sigma / determinant

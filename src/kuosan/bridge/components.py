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
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kuosan.bridge.schedulers import Threshold
from kuosan.build import AUTOENCODERS, make, make_denoiser
from kuosan.denoiser import Denoiser
from kuosan.process import Process, expand
from kuosan.recipe import Recipe
from kuosan.schedules import Table as Steps
from kuosan.solvers import Clip, DynamicThreshold, Row, Table

#: What diffusers calls the forms that it knows.
PREDICTION_TYPES = {"x0": "sample", "eps": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}
FORMS = {name: form for form, name in PREDICTION_TYPES.items()}
TRANSFORMS: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in (Clip, DynamicThreshold, Threshold)}


@dataclass(frozen=True)
class Clock:
    """How a time in [0, 1] is a timestep: N t - 1, or for flows N t. So diffusers' own schedulers have it.

    Args:
        steps: N.
        flow: whether the process is a flow.
    """

    steps: int
    flow: bool

    @classmethod
    def of(cls, process: Process) -> Clock:
        schedule = process.schedule
        return cls(len(schedule.log_snrs) if isinstance(schedule, Steps) else 1000, schedule.convention == "flow")

    def timestep(self, t: float) -> float:
        found = self.steps * t - (0 if self.flow else 1)
        whole = round(found)
        return float(whole) if abs(found - whole) < 1e-9 else found  # of a time i / N, without its rounding

    def time(self, timestep: Any) -> Tensor:
        """Float64: in float32 a thousandth of a step would be lost."""
        told = torch.as_tensor(timestep).to("cpu", torch.float64)
        return (told + (0 if self.flow else 1)) / self.steps


# -- the scheduler -----------------------------------------------------------------------------------------------------


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


# -- models ------------------------------------------------------------------------------------------------------------


class _Whole(ModelMixin, ConfigMixin):
    """A model that is made, then loaded: accelerate's empty weights would leave it without what is computed."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        if options.get("device_map") is None:
            options["low_cpu_mem_usage"] = False
        return super().from_pretrained(pretrained_model_name_or_path, **options)


def form_of(denoiser: Denoiser) -> str:
    """The one of diffusers' forms that a denoiser's predictions are read in: its own, or the nearest to it."""
    if denoiser.preconditioning is not None and denoiser.predicts != "energy":
        return "x0"
    found = {"levels": "x0", "score": "eps", "energy": "eps", "velocity": "flow"}.get(
        denoiser.predicts, denoiser.predicts
    )
    # from noise alone predicted noise says nothing of x0: there the denoiser asks a little later, and says x0
    return "x0" if found == "eps" and float(denoiser.process.alpha(1.0)) == 0 else found


class Network(_Whole):
    """The denoiser of a run as a model of diffusers: its weights, its recipe, and all that it takes to read them.

    Args:
        recipe: as JSON.
        in_channels, sample_size: of the states; a side, or (height, width).
        out_channels: the same again, for pipelines that look whether a variance is predicted too.
        levels: of discrete data; 0 for continuous.
        classes: 0 for none.
    """

    @register_to_config
    def __init__(
        self,
        recipe: dict[str, Any],
        in_channels: int,
        sample_size: int | list[int],
        out_channels: int,
        levels: int = 0,
        classes: int = 0,
    ):
        super().__init__()
        sides = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
        self.denoiser = make_denoiser(
            Recipe.model_validate(recipe), (in_channels, *sides), levels or None, classes
        ).requires_grad_(False)
        self.denoiser.eval()
        self._clock, self._classes = Clock.of(self.denoiser.process), classes

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        found = super().from_pretrained(pretrained_model_name_or_path, **options)
        model = found[0] if isinstance(found, tuple) else found
        model.denoiser = model.denoiser.around(model.denoiser.network)  # loading puts others in its parameters' place
        return found

    @property
    def predicts(self) -> str:
        """The form of what it returns: "x0", "eps", "v" or "flow"."""
        return form_of(self.denoiser)

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """What the run's denoiser says, in the form :attr:`predicts`, (B, C, H, W).

        Args:
            timestep: a number, or of shape () or (B,).
            class_labels: (B,); -1, or any number past the last class, is "any class", and so is None.

        Raises:
            ValueError: states of another shape, classes of a run that has none, or weights in half precision.
        """
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the weights are {self.dtype}, in which the time would be rounded to a few hundred values: load them "
                "in float32, and compute under torch.autocast"
            )
        t = self._clock.time(timestep)
        one = t.numel() == 1 or bool((t == t.flatten()[0]).all())
        if class_labels is not None and self._classes:
            class_labels = torch.where(class_labels < self._classes, class_labels, -1)
        said = self.denoiser(sample, float(t.flatten()[0]) if one else t, class_labels)
        value = said.read(self.predicts)
        return UNet2DOutput(value) if return_dict else (value,)


class Autoencoder(_Whole):
    """The autoencoder of a latent run: codes to images and back.

    Args:
        recipe: as JSON.
        shape: (C, H, W) of an image.
        levels: of it; 0 for continuous data.
        scaling_factor: pipelines divide codes by it: 1, since a run's codes are scaled inside.
    """

    @register_to_config
    def __init__(self, recipe: dict[str, Any], shape: list[int], levels: int = 0, scaling_factor: float = 1.0):
        super().__init__()
        section = Recipe.model_validate(recipe).autoencoder
        assert section is not None
        self.autoencoder = make(AUTOENCODERS, section, "autoencoder", shape=tuple(shape), levels=levels)
        self.autoencoder.requires_grad_(False).eval()

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """q(z | x), as ``.latent_dist``, of images (B, C, H, W) in [-1, 1]."""
        return AutoencoderKLOutput(latent_dist=self.autoencoder.encode(x))

    def decode(self, z: Tensor) -> DecoderOutput:
        """The mean image of each code."""
        return DecoderOutput(sample=self.autoencoder.decode(z).mean)


class Pixels(_Whole):
    """In the place of an autoencoder, where it is pixels that are diffused: images are their own codes."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0):
        super().__init__()
        # a model has a kind and a place; this one has no weights to take them from
        self.register_buffer("nothing", torch.zeros(1))

    def decode(self, z: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=z)

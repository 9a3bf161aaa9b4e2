"""The networks and autoencoders of runs as models of diffusers. Imports diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from kuosan.build import AUTOENCODERS, make, make_denoiser
from kuosan.denoiser import Denoiser
from kuosan.process import Process
from kuosan.recipe import Recipe
from kuosan.schedules import Table as Steps


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


class _OfRun(_Whole):
    """The denoiser of a run, and all that it takes to read what it says."""

    def _make(self, recipe: dict[str, Any], channels: int, size: int | list[int], levels: int, classes: int) -> None:
        sides = [size, size] if isinstance(size, int) else size
        self.denoiser = make_denoiser(Recipe.model_validate(recipe), (channels, *sides), levels or None, classes)
        self.denoiser.requires_grad_(False).eval()
        self._clock = Clock.of(self.denoiser.process)

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

    def _said(
        self, sample: Tensor, timestep: Any, condition: Tensor | None, return_dict: bool
    ) -> UNet2DOutput | tuple[Tensor]:
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the weights are {self.dtype}, in which the time would be rounded to a few hundred values: load them "
                "in float32, and compute under torch.autocast"
            )
        t = self._clock.time(timestep)
        one = t.numel() == 1 or bool((t == t.flatten()[0]).all())
        said = self.denoiser(sample, float(t.flatten()[0]) if one else t, condition)
        value = said.read(self.predicts)
        return UNet2DOutput(value) if return_dict else (value,)


class Network(_OfRun):
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
        self._make(recipe, in_channels, sample_size, levels, classes)
        self._classes = classes

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
        if class_labels is not None and self._classes:
            class_labels = torch.where(class_labels < self._classes, class_labels, -1)
        return self._said(sample, timestep, class_labels, return_dict)


class TextNetwork(_OfRun):
    """The denoiser of a run that is told captions, as pipelines of texts call it: it reads the tokens itself.

    Args:
        recipe, in_channels, sample_size, out_channels, levels: of :class:`Network`.
        time_cond_proj_dim: pipelines ask for it; None, as guidance is not told to the network.
    """

    @register_to_config
    def __init__(
        self,
        recipe: dict[str, Any],
        in_channels: int,
        sample_size: int | list[int],
        out_channels: int,
        levels: int = 0,
        time_cond_proj_dim: None = None,
    ):
        super().__init__()
        self._make(recipe, in_channels, sample_size, levels, 0)

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True, **others: Any
    ) -> UNet2DOutput | tuple[Tensor]:
        """What the run's denoiser says, told the captions, in the form :attr:`predicts`, (B, C, H, W).

        Args:
            timestep: a number, or of shape () or (B,).
            encoder_hidden_states: tokens as :class:`Words` passes them on, (B, L, 1).
            others: what pipelines pass to networks that have it; None here.

        Raises:
            ValueError: as :class:`Network`; something else that the network should be told.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"this network is told a time and captions, and no {given[0]}")
        return self._said(sample, timestep, encoder_hidden_states[..., 0].round().long(), return_dict)


class Words(_Whole):
    """In the place of a text encoder, where the network reads captions itself: tokens as they are.

    Args:
        pad: the token that fills captions up.
    """

    @register_to_config
    def __init__(self, pad: int = 0):
        super().__init__()
        self.pad = pad
        self.register_buffer("nothing", torch.zeros(1))  # as of Pixels

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        """(B, L, 1) of ids (B, L): numbers below 2^24, which float32 says exactly; -1 where it is padding."""
        return (torch.where(ids == self.pad, -1, ids)[..., None].to(self.dtype),)


class Autoencoder(_Whole):
    """The autoencoder of a latent run: codes to images and back.

    Args:
        recipe: as JSON.
        shape: (C, H, W) of an image.
        levels: of it; 0 for continuous data.
        scaling_factor: pipelines divide codes by it: 1, since a run's codes are scaled inside.
        block_out_channels: pipelines of texts take 2^(its length - 1) for how many times smaller codes are.
    """

    @register_to_config
    def __init__(
        self,
        recipe: dict[str, Any],
        shape: list[int],
        levels: int = 0,
        scaling_factor: float = 1.0,
        block_out_channels: list[int] | tuple[int, ...] = (1,),
    ):
        super().__init__()
        section = Recipe.model_validate(recipe).autoencoder
        assert section is not None
        self.autoencoder = make(AUTOENCODERS, section, "autoencoder", shape=tuple(shape), levels=levels)
        self.autoencoder.requires_grad_(False).eval()

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """q(z | x), as ``.latent_dist``, of images (B, C, H, W) in [-1, 1]."""
        return AutoencoderKLOutput(latent_dist=self.autoencoder.encode(x))

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> DecoderOutput | tuple[Tensor]:
        """The mean image of each code: nothing is drawn, whatever the generator."""
        mean = self.autoencoder.decode(z).mean
        return DecoderOutput(sample=mean) if return_dict else (mean,)


class Pixels(_Whole):
    """In the place of an autoencoder, where it is pixels that are diffused: images are their own codes."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0, block_out_channels: list[int] | tuple[int, ...] = (1,)):
        super().__init__()
        # a model has a kind and a place; this one has no weights to take them from
        self.register_buffer("nothing", torch.zeros(1))

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> DecoderOutput | tuple[Tensor]:
        return DecoderOutput(sample=z) if return_dict else (z,)

"""Models of diffusers as networks of ours, ``network(x, t, condition)``. Imports diffusers when a network is made."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kuosan.networks.captions import check_captions

#: Fields of UNet2DConditionModel that ask for something to be told beside a text.
TOLD_MORE = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "time_cond_proj_dim",
    "encoder_hid_dim_type",
)
#: How near a time has to be to that of a whole timestep, in timesteps, to be told as it: float32 is off by 6e-5.
NEAR = 1e-3


def read_json(text: str, what: str = "config") -> dict[str, Any]:
    """Raises ValueError for what is no JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is a JSON object, got {type(found).__name__}")
    return found


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ImportError("models of diffusers need that library: pip install 'kuosan[diffusers]'") from None
    return diffusers


def class_of(config: Mapping[str, Any], known: Sequence[str]) -> type:
    """The class of diffusers that a configuration is of; DiT was once saved as a Transformer2DModel.

    Raises:
        ValueError: it is none of those known.
    """
    name = config.get("_class_name")
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        name = "DiTTransformer2DModel"
    if name not in known:
        raise ValueError(f"_class_name is {name!r}; what is read here is {', '.join(known)}")
    return getattr(_diffusers(), str(name))


def make_module(config: Mapping[str, Any], known: Sequence[str]) -> Any:
    """The model of diffusers that a configuration describes, untrained.

    Raises:
        ValueError: a class that is not known, a field that the class does not have, or a value that it refuses.
    """
    kind = class_of(config, known)
    own = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    # a class that a file was saved as before had fields more; at their defaults they change nothing
    before = inspect.signature(_diffusers().Transformer2DModel.__init__).parameters
    fields = {k: v for k, v in config.items() if not k.startswith("_")}
    legacy = config["_class_name"] == "Transformer2DModel"
    unknown = [
        k
        for k, value in fields.items()
        if k not in own and value not in (None, False) and not (legacy and k in before and before[k].default == value)
    ]
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))} in this version of diffusers")
    try:
        return kind(**{k: v for k, v in fields.items() if k in own})
    except (TypeError, ValueError, NotImplementedError, IndexError, AttributeError) as error:
        raise ValueError(f"{kind.__name__} of diffusers refuses its config: {error}") from None


class DiffusersNetwork(nn.Module):
    """A ``UNet2DModel`` or ``DiTTransformer2DModel`` of diffusers, or any module of their calling forms.

    Time i / steps is timestep i - 1, or, of flows, i: as diffusers' schedulers tell them. DiT's second half of
    channels, which its pipeline drops, is dropped here too.

    Args:
        model: called as ``model(x, timestep, class_labels=...)``, returning an object with ``.sample``.
        steps: of training.
        classes: how many are told apart, 0 for none. Where the model has one embedding more, the last one stands for
            any class.
        flow: whether times are those of a flow.

    Raises:
        ValueError: ``classes`` does not fit the model.
    """

    def __init__(self, model: nn.Module, steps: int = 1000, classes: int = 0, flow: bool = False):
        super().__init__()
        config: Any = getattr(model, "config", {})
        name = "num_class_embeds" if "num_class_embeds" in config else "num_embeds_ada_norm"
        embeddings = (config.get(name) or 0) + (name != "num_class_embeds" and name in config)
        if classes not in (embeddings, max(embeddings - 1, 0)) or (embeddings and not classes):
            wanted = f"{name} = {classes + (name == 'num_class_embeds')}"
            raise ValueError(f"{classes} classes need {wanted} (one for any), got {config.get(name)}")
        self.model, self.steps, self.classes, self.flow = model, steps, classes, flow
        self.any = embeddings > classes
        for part in model.modules():
            if hasattr(part, "token_drop"):  # DiT's labels: what trains it here leaves them out itself
                part.dropout_prob = 0.0  # type: ignore[assignment]

    def timestep(self, t: Tensor) -> Tensor:
        told = t.double() * self.steps - (0 if self.flow else 1)
        whole = told.round()
        return torch.where((told - whole).abs() < NEAR, whole, told).to(t.dtype)

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """Raises ValueError for no class at all, of a model that was never trained without one."""
        options = {}
        if self.classes:
            labels = torch.full((len(x),), -1, device=x.device) if condition is None else condition
            assert isinstance(labels, Tensor)
            if not self.any and bool((labels < 0).any()):
                raise ValueError(f"this model has {self.classes} class embeddings, none of them for any class")
            options["class_labels"] = torch.where(labels < 0, self.classes, labels)
        output = self.model(x, self.timestep(t), **options).sample
        return output[:, : x.shape[1]] if hasattr(self.model, "pos_embed") else output


class DiffusersTextNetwork(DiffusersNetwork):
    """A ``UNet2DConditionModel`` with the text encoder that it was trained with, which stays as it is.

    A condition is int64 (B, L), tokens with those at both ends, -1 after the end; of the empty prompt -1 alone. As
    Stable Diffusion's pipeline has it, the rest is filled up to ``length`` and read like the words.

    Args:
        model: called as ``model(x, timestep, encoder_hidden_states=...)``.
        encoder: a ``CLIPTextModel`` of transformers.
        empty: tokens of the empty prompt: those at both ends, and what fills up the rest.
        length: of what the encoder reads.
        steps, flow: of :class:`DiffusersNetwork`.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: nn.Module,
        empty: tuple[int, int, int],
        length: int,
        steps: int = 1000,
        flow: bool = False,
    ):
        super().__init__(model, steps, 0, flow)
        self.encoder = encoder.requires_grad_(False)
        self.empty, self.length = empty, length
        self._said: tuple[Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> DiffusersTextNetwork:
        super().train(mode)
        self.encoder.eval()
        return self

    def tokens(self, condition: Tensor) -> Tensor:
        """What the encoder reads, (B, length).

        Raises:
            ValueError: prompts that are longer.
        """
        if condition.shape[1] > self.length:
            raise ValueError(f"prompts of this model have at most {self.length} tokens, got {condition.shape[1]}")
        begin, end, rest = self.empty
        ids = condition.new_full((len(condition), self.length), rest)
        ids[:, : condition.shape[1]] = torch.where(condition < 0, rest, condition)
        nothing = (condition < 0).all(1)
        ids[nothing, 0], ids[nothing, 1] = begin, end
        return ids

    def read(self, condition: Tensor) -> Tensor:
        """(B, length, width) of the words; those of the last batch are remembered: a sampling loop asks again."""
        said = self._said
        if said is None or said[0].device != condition.device or not torch.equal(said[0], condition):
            with torch.no_grad():
                said = condition.clone(), self.encoder(self.tokens(condition)).last_hidden_state
            self._said = said
        return said[1]

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        words = self.read(check_captions(condition, len(x), x.device))
        return self.model(x, self.timestep(t), encoder_hidden_states=words.to(x.dtype)).sample


UNCONDITIONAL = ("UNet2DModel", "DiTTransformer2DModel")
TEXT = ("UNet2DConditionModel",)


def network(
    config: str,
    shape: Sequence[int],
    classes: int,
    outputs: int,
    text_encoder: str = "",
    empty: str = "",
    length: int = 77,
    steps: int = 1000,
    flow: bool = False,
) -> DiffusersNetwork:
    """The network of a recipe, untrained: ``kind = "diffusers"``.

    Args:
        config: of the model, JSON with its ``_class_name``: UNet2DModel, DiTTransformer2DModel, UNet2DConditionModel.
        shape: (C, H, W) of what is diffused.
        classes: that it is told, 0 for none.
        outputs: numbers for each coordinate: two with a learned variance.
        text_encoder: config of the CLIPTextModel that a UNet2DConditionModel is told texts by.
        empty: of it, the tokens of the empty prompt: begin, end and padding.
        length: of it, tokens of a prompt.
        steps, flow: of :class:`DiffusersNetwork`.

    Raises:
        ValueError: a config that does not fit the shape, the classes or the outputs.
    """
    values = read_json(config)
    if len(shape) != 3:
        raise ValueError(f"models of diffusers are of images (C, H, W), got shape {tuple(shape)}")
    model = make_module(values, TEXT if text_encoder else UNCONDITIONAL)
    had, (channels, height, width) = model.config, shape
    if had["in_channels"] != channels:
        raise ValueError(f"config: in_channels is {had['in_channels']}, and what is diffused has {channels} channels")
    transformer = type(model).__name__ == "DiTTransformer2DModel"
    says = had["out_channels"] or channels
    if says != outputs * channels and not (transformer and says == 2 * channels):
        raise ValueError(f"config: out_channels must be {outputs * channels}, of {outputs} x {channels}, got {says}")
    if transformer:
        if (height, width) != (had["sample_size"],) * 2:
            raise ValueError(f"config: sample_size is {had['sample_size']}, and what is diffused {height} x {width}")
    else:
        factor = 2 ** (len(had["block_out_channels"]) - 1)
        if height % factor or width % factor:
            raise ValueError(f"config: block_out_channels of this number halve {height} x {width} to no whole number")
    if not text_encoder:
        return DiffusersNetwork(model, steps, classes, flow)
    for field in TOLD_MORE:
        if had[field] is not None:
            raise ValueError(f"config: {field} is {had[field]!r}: a model that is told a text alone has none")
    numbers = empty.split()
    if len(numbers) != 3 or not all(one.isdigit() for one in numbers):
        raise ValueError(f"empty is three tokens, begin, end and padding, such as '49406 49407 49407', got {empty!r}")
    encoder = make_encoder(read_json(text_encoder, "text_encoder"))
    if encoder.config.max_position_embeddings < length:
        raise ValueError(f"text_encoder reads at most {encoder.config.max_position_embeddings} tokens, not {length}")
    if encoder.config.hidden_size != had["cross_attention_dim"]:
        raise ValueError(
            f"config: cross_attention_dim is {had['cross_attention_dim']}, and the text encoder's words are "
            f"{encoder.config.hidden_size}"
        )
    begin, end, rest = map(int, numbers)
    return DiffusersTextNetwork(model, encoder, (begin, end, rest), length, steps, flow)


def make_encoder(config: Mapping[str, Any]) -> Any:
    """The untrained CLIPTextModel of a configuration.

    Raises:
        ImportError: transformers is not installed. ValueError: of another kind, or impossible.
    """
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError:
        raise ImportError("text encoders need the library transformers: pip install 'kuosan[diffusers]'") from None
    if config.get("model_type") != "clip_text_model" or "auto_map" in config:
        raise ValueError(f"text_encoder: model_type is clip_text_model, got {config.get('model_type')!r}")
    if config.get("use_attention_mask"):
        raise ValueError("text_encoder: use_attention_mask is not read: prompts are filled up and read whole")
    about = ("dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path", "model_type")
    try:
        return CLIPTextModel(CLIPTextConfig(**{k: v for k, v in config.items() if k not in about}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"text_encoder: {error}") from None

"""A judge of captioned images whose captions say what can be read off them: one classifier for each attribute."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu, softplus

from kuosan.image.characters import ATTRIBUTES, LAST_OF_BUCKET, attributes_of, strokes_of, unseen
from kuosan.image.data import ImageData, to_pixels
from kuosan.progress import Progress

#: Passes over the training images.
EPOCHS = 13
#: Strokes that are told apart; more count as so many.
MOST_STROKES = 31
#: Pixels down and right that the images are shifted by, while training and while judging.
_SHIFTS = tuple(product((-1, 0, 1), repeat=2))


@dataclass(frozen=True)
class Share:
    """How many of some images have the value of an attribute that was asked for.

    Attributes:
        right: the share.
        error: its binomial standard error.
        images: how many were asked for a value that counts.
    """

    right: float
    error: float
    images: int

    @classmethod
    def of(cls, right: Tensor) -> Share | None:
        """Of bool (n,); None of none."""
        n = len(right)
        if n == 0:
            return None
        share = float(right.double().mean())
        return cls(share, math.sqrt(share * (1 - share) / n), n)


class _Network(nn.Module):
    """Residual 3x3 convolutions at a half, a quarter and an eighth of the size, and a head for each attribute.

    That of strokes counts them: learned as buckets, their borders would be all that is ever said of a count.
    """

    def __init__(self, shape: tuple[int, int, int], width: int = 48):
        super().__init__()
        self.first = nn.Conv2d(4 * shape[0], width, 3, padding=1)
        widths = (width, 2 * width, 4 * width)
        self.blocks = nn.ModuleList(
            _Block(widths[max(0, i - 1)], out, first=not k) for i, out in enumerate(widths) for k in range(2)
        )
        self.features, places = nn.Dropout(0.2), (shape[1] // 8) ** 2
        self.heads = nn.ModuleList(
            _Count(widths[-1], places)
            if name == "strokes"
            else nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * places, len(values)))
            for name, values in ATTRIBUTES.items()
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.first(nn.functional.pixel_unshuffle(x, 2))
        for block in self.blocks:
            h = block(h)
        h = self.features(h)
        return [head(h) for head in self.heads]


class _Count(nn.Module):
    """How many strokes: the sum of what there is at each place, as the logits of a Gaussian of 0 to `MOST_STROKES`.

    A head that sees all places at once learns which counts a radical never has in a typeface, and is then wrong about
    just the combinations that are held out.
    """

    def __init__(self, channels: int, places: int):
        super().__init__()
        self.each, self.spread = nn.Linear(channels, 1), nn.Linear(channels, 1)
        nn.init.zeros_(self.each.weight)
        nn.init.constant_(self.each.bias, math.log(math.expm1(10 / places)))  # at first, ten on every image

    def forward(self, h: Tensor) -> Tensor:
        """(B, MOST_STROKES + 1) of features (B, C, H, W)."""
        with torch.autocast(h.device.type, enabled=False):
            h = h.float().flatten(2).mT
            mean = softplus(self.each(h)).sum((1, 2))
            spread = 0.3 + softplus(self.spread(h.mean(1))).squeeze(1)
        away = torch.arange(MOST_STROKES + 1, device=h.device) - mean[:, None]
        return -((away / spread[:, None]) ** 2) / 2


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, first: bool):
        super().__init__()
        self.halve = first and inputs != outputs
        inputs = inputs if first else outputs
        self.one = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.two = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)])
        self.beside = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor) -> Tensor:
        if self.halve:
            h = nn.functional.max_pool2d(h, 2)
        return self.beside(h) + self.two(silu(self.norms[1](self.one(silu(self.norms[0](h))))))


class AttributeJudge:
    """Classifiers of each attribute of Chinese characters, trained on the real training images alone.

    Attributes:
        reference: the quality of the real held-out images, which samples as good as real ones would have.
    """

    reference: dict[str, Any]

    def __init__(self, network: nn.Module, shape: tuple[int, int, int], levels: int):
        self._network, self._shape, self._levels = network.eval(), shape, levels

    @classmethod
    def train(cls, data: ImageData, epochs: int = EPOCHS, seed: int = 0) -> AttributeJudge:
        """Train on the training split, shifted by up to a pixel; the held-out split only measures the judge.

        The caller's random state is left as it was.

        Raises:
            ValueError: the images have no captions, or their captions do not say the attributes.
        """
        cls.check(data)
        wanted = attributes_of(data.train.captions or ())
        wanted[:, list(ATTRIBUTES).index("strokes")] = strokes_of(data.train.captions or ()).clamp_max(MOST_STROKES)
        levels, batch = data.train.levels, 128
        steps = max(1, epochs * len(levels) // batch)
        chance, progress = torch.Generator().manual_seed(seed), Progress("judge: step")
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network: nn.Module = _Network(data.shape)
            network = network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
            optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
            order = torch.empty(0, dtype=torch.int64)
            for step in range(steps):
                if len(order) < batch:
                    order = torch.randperm(len(levels), generator=chance)
                chosen, order = order[:batch], order[batch:]
                x = _shifted(to_pixels(levels[chosen], data.level_count), chance)
                with torch.autocast("cpu", torch.bfloat16):
                    said = network(x.contiguous(memory_format=torch.channels_last))
                loss = sum(cross_entropy(one.float(), wanted[chosen, a]) for a, one in enumerate(said))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[union-attr]
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)  # a count far from where the first Gaussian is
                optimiser.step()
                schedule.step()
                progress(step + 1, steps)
        judge = cls(network, data.shape, data.level_count)
        judge.reference = judge.quality(data.held_out.levels, data.held_out.captions or ())
        return judge

    @staticmethod
    def check(data: ImageData) -> None:
        """Raises ValueError for images without captions, or whose captions do not say the attributes."""
        if data.train.captions is None or data.held_out.captions is None:
            raise ValueError(f"{data.name} has no captions, and a judge of attributes checks what they say")
        if bool((attributes_of(data.train.captions) < 0).any()):
            raise ValueError(
                f"the captions of {data.name} do not say {', '.join(ATTRIBUTES)}: there is no judge of them"
            )

    @torch.no_grad()
    def judged(self, levels: Tensor) -> Tensor:
        """The value of each attribute of images uint8 (N, C, H, W), int64 (N, A).

        Raises:
            ValueError: images of another shape or type.
        """
        if levels.dtype != torch.uint8 or tuple(levels.shape[1:]) != self._shape:
            raise ValueError(f"this judge expects uint8 {self._shape}, got {levels.dtype} {tuple(levels.shape[1:])}")
        parts = (to_pixels(part, self._levels) for part in levels.cpu().split(512))
        return torch.cat([torch.stack(list(map(_value, ATTRIBUTES, self._chances(x))), dim=1) for x in parts])

    def _chances(self, x: Tensor) -> list[Tensor]:
        """Of each value of each attribute, (B, values): the mean over images shifted as in training."""
        shifted = [[head.softmax(1) for head in self._network(_moved(x, *by))] for by in _SHIFTS]
        return [torch.stack(of_one).mean(0) for of_one in zip(*shifted, strict=True)]

    def quality(self, levels: Tensor, captions: Sequence[str]) -> dict[str, Any]:
        """Of images and the captions that they were asked for with: which attributes they have.

        Returns:
            ``samples``, and of each attribute ``seen`` and ``unseen``: the :class:`Share` of images that have the value
            asked for, among captions whose combination of attributes training had, and among those that it had not. Of
            radicals the 20 commonest alone count.
        """
        wanted, held, judged = attributes_of(captions), unseen(captions), self.judged(levels)
        found: dict[str, Any] = {}
        for a, (name, values) in enumerate(ATTRIBUTES.items()):
            counts = (wanted[:, a] >= 0) & (wanted[:, a] != (len(values) - 1 if values[-1] == "other" else -1))
            right = judged[:, a] == wanted[:, a]
            shares = {"seen": Share.of(right[counts & ~held]), "unseen": Share.of(right[counts & held])}
            found[name] = {key: None if one is None else vars(one) for key, one in shares.items()}
        return {"samples": len(levels), "attributes": found}

    @staticmethod
    def in_words(quality: Mapping[str, Any]) -> list[str]:
        """A quality, with that of real images as ``held_out``, as lines of a table."""
        real = quality["held_out"]
        lines = [
            f"{'right, by classifiers of real images':40s}{'samples':>10s}{'real':>10s}",
            f"{'  images':40s}{quality['samples']:>10d}{real['samples']:>10d}",
        ]
        for name, found in quality["attributes"].items():
            for key, words in (("seen", "combinations seen"), ("unseen", "combinations held out")):
                shown = [f"{one['right']:.1%}" if one else "-" for one in (found[key], real["attributes"][name][key])]
                lines.append(f"{f'  {name}, {words}':40s}{shown[0]:>10s}{shown[1]:>10s}")
        return lines

    def save(self, folder: str | Path) -> None:
        """Write ``attributes.json`` and ``attributes.safetensors`` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self._network.state_dict().items()}
        save_file(state, folder / "attributes.safetensors")
        said = {"shape": self._shape, "levels": self._levels, "reference": self.reference}
        (folder / "attributes.json").write_text(json.dumps(said, indent=2), "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> AttributeJudge:
        """The judge that :meth:`save` wrote. Raises ValueError for damaged files."""
        folder = Path(folder)
        try:
            said = json.loads((folder / "attributes.json").read_text("utf-8"))
            shape = tuple(said["shape"])
            network = _Network(shape)
            network.load_state_dict(load_file(folder / "attributes.safetensors"))
            judge = cls(network, shape, said["levels"])
            judge.reference = said["reference"]
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the judge saved in {folder} is damaged: delete it ({error})") from None
        return judge


def _value(name: str, chances: Tensor) -> Tensor:
    """The likeliest value of an attribute, (B,); of strokes the likeliest bucket of counts."""
    if name != "strokes":
        return chances.argmax(1)
    ends = (-1, *LAST_OF_BUCKET, MOST_STROKES)
    return torch.stack([chances[:, a + 1 : b + 1].sum(1) for a, b in pairwise(ends)], dim=1).argmax(1)


def _shifted(x: Tensor, chance: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each moved by up to a pixel each way of its own."""
    by = torch.randint(0, len(_SHIFTS), (len(x),), generator=chance)
    moved = torch.empty_like(x)
    for one, shift in enumerate(_SHIFTS):
        moved[by == one] = _moved(x[by == one], *shift)
    return moved


def _moved(x: Tensor, down: int, right: int) -> Tensor:
    """By up to a pixel each way, white coming in."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=1.0)
    return padded[:, :, 1 + down : 1 + down + x.shape[2], 1 + right : 1 + right + x.shape[3]]

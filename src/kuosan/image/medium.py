"""Images as a medium: pixels for the model, PNG files and sheets of them, a classifier as the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kuosan.fetch import to_stderr
from kuosan.files import save_png
from kuosan.image import data as image_data
from kuosan.image.captions import CAPTIONED
from kuosan.image.data import Examples, ImageData, to_levels, to_pixels
from kuosan.image.judge import Judge
from kuosan.image.pictures import good_scale, sheet, to_image
from kuosan.medium import Medium, Unit
from kuosan.recipe import Data, RecipeError


class ImageMedium(Medium):
    """Images, on integer levels; a model sees them as pixels in [-1, 1]."""

    one, many, suffix = "image", "images", ".png"
    unit = Unit("bits per dimension", "bits_per_dim", each_dimension=True)

    @staticmethod
    def read(section: Data) -> ImageData:
        section.refuse("texts", "length", "tokens", "vocabulary", "text", "label", why="of texts, and these are images")
        if section.name is not None:
            section.refuse("channels", "held_out", why="of a folder of your own: this data has its own")
            return (image_data.NAMED | CAPTIONED)[section.name]()
        if section.folder is None or section.size is None:
            raise RecipeError("data.size: a folder of images needs one")
        return image_data.folder(Path(section.folder).expanduser(), section.size, section.channels, section.held_out)

    @staticmethod
    def describe(section: Data, data: ImageData) -> dict[str, Any]:
        parts = [repr((data.level_count, data.classes)).encode()]
        for part in (data.train, data.held_out):
            for tensor in (part.levels, part.labels):
                parts.append(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        return {"shape": list(data.shape), "levels": data.level_count, "parts": parts}

    # -- what a model sees --------------------------------------------------------------------------------------------

    def batch(self, part: Examples, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return to_pixels(part.levels[index], self.levels), self.labels(part, index)

    def outputs(self, x: Tensor) -> Tensor:
        return to_levels(x, self.levels)

    def read_files(self, files: Sequence[str | Path]) -> tuple[list[str], Tensor]:
        return image_data.read_pictures(files, self.shape, self.levels)

    def read_one(self, file: str | Path) -> Tensor:
        """A picture as pixels (C, H, W), cropped and scaled."""
        return image_data.read_picture(file, self.shape, self.levels)

    def read_mask(self, file: str | Path) -> Tensor:
        """(C, H, W) bool, True where a picture is black: there a sample is held."""
        return (image_data.read_picture(file, (1, *self.shape[1:]), 2) < 0).expand(self.shape)

    def check_mask(self, picture: str | Path, mask: str | Path) -> None:
        """Raises ValueError for a mask of another size than its picture: it would be cropped and scaled otherwise."""
        with Image.open(picture) as one, Image.open(mask) as other:
            if one.size != other.size:
                (a, b), (c, d) = one.size, other.size
                raise ValueError(f"the picture {picture} has {a} x {b} pixels and the mask {mask} {c} x {d}: one size")

    # -- samples ------------------------------------------------------------------------------------------------------

    def save(self, sample: Tensor, path: Path, notes: Mapping[str, Any]) -> None:
        save_png(to_image(sample, self.levels), path, notes)

    def sheet(
        self, samples: Sequence[Path] | Tensor, path: Path, columns: int | None, notes: Mapping[str, Any]
    ) -> Path:
        path, count = path.with_suffix(".png"), self.levels
        if not isinstance(samples, Tensor):
            pictures, count = [torch.from_numpy(np.array(Image.open(file))) for file in samples], 256
            samples = torch.stack([p[None] if p.ndim == 2 else p.movedim(-1, 0) for p in pictures])
        save_png(sheet(samples, count, columns, good_scale(self.shape)), path, notes)
        return path

    # -- judging ------------------------------------------------------------------------------------------------------

    def trained_judge(self) -> Judge:
        kept = self.folder / "judge"
        if kept.is_dir():
            return Judge.load(kept)
        if not self.info["classes"]:
            raise ValueError("the images have no classes, and the judge is a classifier")
        to_stderr("training the judge of real images ...")
        judge = Judge.train(self.data)
        judge.save(kept)
        return judge

    def quality(self, samples: Tensor, labels: Tensor | None) -> dict[str, Any] | None:
        if self.judge is None:
            return None
        return asdict(self.judge.quality(samples, labels)) | {"held_out": asdict(self.judge.reference)}

    def quality_in_words(self, quality: Mapping[str, Any]) -> list[str]:
        real = quality["held_out"]
        lines = [
            f"{'quality, by a classifier of real images':40s}{'samples':>10s}{'real':>10s}",
            f"{'  images':40s}{quality['samples']:>10d}{real['samples']:>10d}",
            f"{'  90 % sure':40s}{quality['confident']:>10.1%}{real['confident']:>10.1%}",
            f"{'  Frechet distance in its features':40s}{quality['frechet']:>10.3f}{quality['frechet_of_real']:>10.3f}",
        ]
        if quality["agreement"] is not None:
            lines.append(
                f"{'  judged as the class asked for':40s}{quality['agreement']:>10.1%}{real['agreement']:>10.1%}"
            )
        shares = "  ".join(f"{name} {share:.0%}" for name, share in quality["classes"].items())
        return [*lines, f"  classes: {shares}"]

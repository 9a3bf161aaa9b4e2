"""A kind of data, as runs see it: how it is read, what a model sees of it, how samples are kept, judged and named."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kuosan.recipe import Data, RecipeError


@dataclass(frozen=True)
class Unit:
    """What a likelihood is given in.

    Args:
        name: in words.
        key: in records.
        each_dimension: bits for each coordinate, or nats for a whole example.
    """

    name: str
    key: str
    each_dimension: bool

    def of_bits(self, dimensions: int) -> float:
        """What one bit per dimension is, of examples of so many."""
        return 1.0 if self.each_dimension else math.log(2) * dimensions


class Medium(ABC):
    """One data set of a kind: images, texts.

    Args:
        section: the recipe's ``data``.
        info: of run.json, with what :meth:`describe` says of the data.
        folder: of the run, where what samples and their judge need is kept.
        data: as :meth:`read` gives it, if it has been read.

    Attributes:
        one, many: what an example is called.
        unit: of likelihoods.
        suffix: of a sample's file.
    """

    one: ClassVar[str]
    many: ClassVar[str]
    unit: ClassVar[Unit]
    suffix: ClassVar[str]

    def __init__(self, section: Data, info: Mapping[str, Any], folder: Path, data: Any = None):
        self.section, self.info, self.folder = section, info, folder
        if data is not None:
            self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.info["shape"])

    @property
    def levels(self) -> int:
        """How many values a coordinate may have; 0 where they are real numbers."""
        return self.info["levels"]

    # -- reading ------------------------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def read(section: Data) -> Any:
        """The data, with parts ``train`` and ``held_out``, ``classes``, and where they come from.

        Raises:
            RecipeError: a section of the recipe that does not fit the data.
        """

    @staticmethod
    @abstractmethod
    def describe(section: Data, data: Any) -> dict[str, Any]:
        """Of the data, for run.json: ``shape``, ``levels``, and ``parts``, tensors and words that tell it from other
        data."""

    @cached_property
    def data(self) -> Any:
        """The data, read again."""
        return self.read(self.section)

    def keep(self) -> None:
        """Write into the run's folder what samples need of the data, so that they need not be read for them."""

    # -- what a model sees --------------------------------------------------------------------------------------------

    @abstractmethod
    def batch(self, part: Any, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """x_0 of some examples of a part, and what a model is told of each; None where it is told nothing."""

    def labels(self, part: Any, index: Tensor) -> Tensor | None:
        """The classes of some examples of a part, if the recipe wants that a model is told them."""
        return part.labels[index] if self.section.conditional else None

    def untold(self, condition: Tensor, keep: Tensor) -> Tensor:
        """What a model in training is told of a batch of which only some are to be told it: elsewhere -1, nothing.

        Args:
            condition: (B, ...), of :meth:`batch`.
            keep: (B,), bool.
        """
        return torch.where(keep.reshape(-1, *(1,) * (condition.ndim - 1)), condition, -1)

    def conditions(self, prompts: Sequence[str]) -> Tensor:
        """What a model is told of prompts, one for each sample. Raises ValueError where there can be none."""
        raise ValueError(f"these {self.many} were not learned with captions: there is nothing to prompt")

    def size(self, part: Any) -> int:
        """How many examples a part has."""
        return len(part)

    def arranged(self, part: Any, index: Tensor) -> Tensor:
        """The same examples in an order in which neighbours make the cheapest batches."""
        return index

    @abstractmethod
    def outputs(self, x: Tensor) -> Tensor:
        """Samples as they are kept, from what a model draws."""

    @abstractmethod
    def read_files(self, files: Sequence[str | Path]) -> tuple[list[str], Tensor]:
        """Names and x_0 of a user's own files."""

    # -- likelihoods --------------------------------------------------------------------------------------------------

    def in_other_units(self, total: float, x: Tensor) -> dict[str, float]:
        """A mean likelihood of some examples in other units than :attr:`unit`, by name."""
        return {}

    def baselines(self, x: Tensor) -> dict[str, float]:
        """What simple models of the same training data say of some examples, in the unit, by name."""
        return {}

    # -- samples ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def save(self, sample: Tensor, path: Path, notes: Mapping[str, Any]) -> None:
        """Write one sample."""

    @abstractmethod
    def sheet(
        self, samples: Sequence[Path] | Tensor, path: Path, columns: int | None, notes: Mapping[str, Any]
    ) -> Path:
        """Write many samples, or the files of them, as one page to look at, and say where."""

    def glimpse(self, samples: Sequence[Mapping[str, Any]], most: int = 16) -> str:
        """The first samples as the terminal can show them, each with its ``file`` and ``class``; or nothing."""
        return ""

    # -- judging ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def trained_judge(self) -> Any:
        """A judge that was trained on the real training examples, kept in the run's folder.

        Raises:
            ValueError: there cannot be one; says why.
        """

    @cached_property
    def _judged_by(self) -> tuple[Any, str]:
        try:
            return self.trained_judge(), ""
        except (ValueError, ImportError) as error:  # too few of a class; scikit-learn not installed
            return None, str(error)

    @property
    def judge(self) -> Any:
        """The judge, or None where there cannot be one."""
        return self._judged_by[0]

    @property
    def why_no_judge(self) -> str:
        """Why there is no judge, in words; empty if there is one."""
        return self._judged_by[1]

    @abstractmethod
    def quality(self, samples: Tensor, labels: Tensor | None) -> dict[str, Any] | None:
        """What can be said of samples drawn with these classes, and ``held_out``, the same of real ones; or None."""

    @abstractmethod
    def quality_in_words(self, quality: Mapping[str, Any]) -> list[str]:
        """The same as lines of a table."""


class TrainingExamples:
    """The training examples of a medium as the training loop reads them."""

    def __init__(self, medium: Medium):
        self._medium, self._part = medium, medium.data.train
        self.shape = medium.shape

    def __len__(self) -> int:
        return self._medium.size(self._part)

    def arranged(self, index: Tensor) -> Tensor:
        return self._medium.arranged(self._part, index)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._medium.batch(self._part, index)

    def untold(self, condition: Tensor, keep: Tensor) -> Tensor:
        return self._medium.untold(condition, keep)


def fingerprint(described: Mapping[str, Any]) -> str:
    """A hash of data, from what :meth:`Medium.describe` says of them."""
    digest = hashlib.sha256()
    for part in described["parts"]:
        digest.update(part)
    return digest.hexdigest()


def medium_of(section: Data) -> type[Medium]:
    """The kind of data that a recipe is of.

    Raises:
        RecipeError: no data set has that name.
    """
    from kuosan.image.captioned import CaptionedMedium
    from kuosan.image.captions import CAPTIONED
    from kuosan.image.data import NAMED as IMAGES
    from kuosan.image.medium import ImageMedium
    from kuosan.speech.data import NAMED as RECORDINGS
    from kuosan.speech.medium import SpeechMedium
    from kuosan.speech.transcribed import TranscribedMedium
    from kuosan.text.data import NAMED as TEXTS
    from kuosan.text.medium import TextMedium

    named = (*IMAGES, *CAPTIONED, *TEXTS, *RECORDINGS)
    if section.name is not None and section.name not in named:
        raise RecipeError(f"data.name: must be one of {', '.join(named)}, got {section.name!r}")
    if section.name is not None and (section.speech is not None) != (section.name in RECORDINGS):
        raise RecipeError(
            f"data.name: {section.name} "
            + ("is speech: add a table [data.speech]" if section.speech is None else "is not speech: drop data.speech")
        )
    if section.speech is not None:
        return TranscribedMedium if section.speech.state == "mel" else SpeechMedium
    if section.texts is not None or section.name in TEXTS:
        if section.captions is not None:
            raise RecipeError(f"data.captions: is of images, and {section.name} is of texts: drop it")
        return TextMedium
    return ImageMedium if section.captions is None else CaptionedMedium


def read_data(section: Data) -> Any:
    """The data of a recipe, fetched or read.

    Raises:
        RecipeError: there is none such, or it has no classes and the recipe asks for them.
    """
    data = medium_of(section).read(section)
    if section.conditional and data.classes is None:
        raise RecipeError(
            f"data.conditional: {data.name} has no classes; give each {medium_of(section).one} one, or set it to false"
        )
    return data

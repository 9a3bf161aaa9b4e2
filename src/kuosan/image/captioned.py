"""Captioned images as a medium: a model is told the words of each image's caption, and sampled with a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kuosan.fetch import to_stderr
from kuosan.image import captions
from kuosan.image.attributes import AttributeJudge
from kuosan.image.data import NAMED, Examples, ImageData
from kuosan.image.medium import ImageMedium
from kuosan.recipe import CaptionsSection, Data, RecipeError
from kuosan.seeds import stream
from kuosan.tokenizer import UNKNOWN, Tokenizer

#: Captions that a run keeps, to be drawn where nobody gives a prompt: half of them held-out ones.
KEPT = 4096


class Words(Protocol):
    """What turns captions into tokens."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, path: Path) -> None: ...


class CaptionedMedium(ImageMedium):
    """Images with captions; a condition is int64 (B, L): the tokens of a caption, -1 after its end."""

    @staticmethod
    def read(section: Data) -> ImageData:
        section.refuse("length", "tokens", "vocabulary", "label", why="of texts: those of captions are data.captions'")
        if section.name is not None:
            section.refuse("channels", "held_out", "text", why="of a folder of your own: this data has its own")
            if section.name in NAMED:
                raise RecipeError(f"data.captions: {section.name} has none; {', '.join(captions.CAPTIONED)} have")
            return captions.CAPTIONED[section.name]()
        if section.folder is None or section.size is None:
            raise RecipeError("data.size: a folder of images needs one")
        root = Path(section.folder).expanduser()
        return captions.folder(root, section.size, section.channels, section.held_out, section.text)

    @staticmethod
    def describe(section: Data, data: ImageData) -> dict[str, Any]:
        described = ImageMedium.describe(section, data)
        for part in (data.train, data.held_out):
            described["parts"].append(json.dumps(part.captions).encode())
        return described

    @property
    def how(self) -> CaptionsSection:
        """Captions become tokens."""
        assert self.section.captions is not None
        return self.section.captions

    @cached_property
    def tokenizer(self) -> Words:
        """The words of the training captions, as they were when the run began."""
        if self.how.pretrained is not None:
            from kuosan.bridge.encoders import PretrainedWords

            kept = self.folder / "tokenizer"
            return PretrainedWords.load(kept if kept.is_dir() else self.how.pretrained)
        kept = self.folder / "tokenizer.json"
        if kept.is_file():
            return Tokenizer.load(kept)
        found = self.data.train.captions
        return Tokenizer.train(found, self.how.tokens, self.how.vocabulary)

    def keep(self) -> None:
        self.tokenizer.save(self.folder / ("tokenizer.json" if self.how.pretrained is None else "tokenizer"))
        longer = sum(len(ids) > self.how.length for ids in self.tokenizer.encode_all(self.data.train.captions))
        if longer:
            to_stderr(f"{longer:,} of {len(self.data.train):,} captions have more than {self.how.length} tokens: cut")
        parts = []
        for part in (self.data.held_out, self.data.train):
            chosen = torch.randperm(len(part), generator=stream("prompts"))[: KEPT // 2].tolist()
            parts.append([part.captions[i] for i in chosen])
        count = min(map(len, parts))  # in turn, so that the first few are of both
        prompts = [caption for pair in zip(*(part[:count] for part in parts), strict=True) for caption in pair]
        (self.folder / "prompts.json").write_text(json.dumps(prompts, ensure_ascii=False, indent=0), "utf-8")

    @cached_property
    def prompts(self) -> list[str]:
        """Captions to draw where nobody gives a prompt, held-out ones and training ones in turn."""
        return json.loads((self.folder / "prompts.json").read_text("utf-8"))

    # -- what a model sees --------------------------------------------------------------------------------------------

    def batch(self, part: Examples, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().batch(part, index)[0], self._tokens(part)[index].long()

    def _tokens(self, part: Examples) -> Tensor:
        """Of all captions of a part, int32 (N, L), made once."""
        made = self.__dict__.setdefault("_made", {})
        if id(part) not in made:
            assert part.captions is not None
            made[id(part)] = self._padded(self.tokenizer.encode_all(part.captions)).int()
        return made[id(part)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        found = torch.full((len(rows), self.how.length), -1)
        for row, ids in zip(found, rows, strict=True):
            kept = torch.tensor(ids[: self.how.length], dtype=torch.int64)
            row[: len(kept)] = kept
        return found

    def conditions(self, prompts: Sequence[str]) -> Tensor:
        """The tokens of prompts, int64 (N, L), -1 after the end; the empty prompt is all -1.

        Raises:
            ValueError: a prompt that is too long, or of which no word is known.
        """
        rows, strangers = self.tokenizer.encode_all(list(prompts)), []
        for prompt, ids in zip(prompts, rows, strict=True):
            begins = prompt if len(prompt) <= 60 else f"{prompt[:60]}..."
            if len(ids) > self.how.length:
                raise ValueError(
                    f"a prompt of this model has at most {self.how.length} tokens, and {begins!r} has {len(ids):,}"
                )
            strange = [] if not isinstance(self.tokenizer, Tokenizer) else [i for i in ids if i == UNKNOWN]
            if strange and len(strange) == len(ids):
                raise ValueError(f"no word of {begins!r} is among those that the model has learned")
            if strange:
                strangers.append(f"{begins!r}: {len(strange)} of {len(ids)} words are not known to the model")
        if strangers:
            to_stderr(strangers[0] + (f", nor all of {len(strangers) - 1} more prompts" if strangers[1:] else ""))
        return self._padded(rows)

    def kept_conditions(self, n: int) -> Tensor:
        """Of the kept captions in turn, cut and with unknown words as in training, (n, L)."""
        found = self._padded(self.tokenizer.encode_all(self.prompts[:n]))
        return found[torch.arange(n) % len(found)]

    def words(self, condition: Tensor) -> list[str]:
        """The prompts again, as far as their tokens say them."""
        return [self.tokenizer.decode(row[row >= 0].tolist()) for row in condition.cpu()]

    # -- judging ------------------------------------------------------------------------------------------------------

    def trained_judge(self) -> Any:
        """A judge of attributes, where captions say them."""
        kept = self.folder / "judge"
        if kept.is_dir():
            return AttributeJudge.load(kept)
        AttributeJudge.check(self.data)
        to_stderr("training the judge of real images ...")
        judge = AttributeJudge.train(self.data)
        judge.save(kept)
        return judge

    def quality(self, samples: Tensor, labels: Tensor | None) -> dict[str, Any] | None:
        if self.judge is None or labels is None:
            return None
        return self.judge.quality(samples, self.words(labels)) | {"held_out": self.judge.reference}

    def quality_in_words(self, quality: Mapping[str, Any]) -> list[str]:
        return AttributeJudge.in_words(quality)

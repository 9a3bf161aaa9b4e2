"""Texts as a medium: tokens for the model, text files, and a judge of class, fluency and variety."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuosan.fetch import to_stderr
from kuosan.medium import Medium, Unit, fingerprint
from kuosan.recipe import Data
from kuosan.text import data as text_data
from kuosan.text.data import TextData, Texts
from kuosan.text.judge import TextJudge, copied, distinct, entropy
from kuosan.text.ngram import NGram
from kuosan.tokenizer import PAD, UNKNOWN, Tokenizer

#: Of a text that is given in part: a token that is to be drawn.
BLANK = "_"
#: Of the n-grams that fluency is measured by.
ORDER = 3


class TextMedium(Medium):
    """Texts, as the tokens of a vocabulary that was learned from the training part; padding follows their end."""

    one, many, suffix = "text", "texts", ".txt"
    unit = Unit("nats per text", "nats_per_text", each_dimension=False)

    @staticmethod
    def read(section: Data) -> TextData:
        section.refuse("size", "channels", why="of images, and these are texts")
        if section.name is not None:
            own = ("length", "tokens", "vocabulary", "text", "label", "held_out")
            section.refuse(*own, why="of texts of your own: this data has its own")
            return text_data.NAMED[section.name]()
        assert section.texts is not None
        assert section.length is not None
        return text_data.load(
            Path(section.texts).expanduser(),
            length=section.length,
            kind=section.tokens,
            size=section.vocabulary,
            text=section.text,
            label=section.label,
            held_out=section.held_out,
        )

    @staticmethod
    def describe(section: Data, data: TextData) -> dict[str, Any]:
        parts = [repr((data.tokenizer.tokens, data.classes)).encode()]
        for part in (data.train, data.held_out):
            for tensor in (part.tokens, part.labels):
                parts.append(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        return {"shape": [data.length], "levels": data.tokenizer.size, "parts": parts}

    @cached_property
    def data(self) -> TextData:
        """The data, read again.

        Raises:
            ValueError: they are not what the model was trained on: its tokens would be other words.
        """
        data = self.read(self.section)
        if fingerprint(self.describe(self.section, data)) != self.info["data"]["sha256"]:
            raise ValueError(f"{data.source} has changed since {self.folder} was trained on it: train another run")
        return data

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data's vocabulary, as it was when the run began."""
        return Tokenizer.load(self.folder / "tokenizer.json")

    def keep(self) -> None:
        self.data.tokenizer.save(self.folder / "tokenizer.json")

    # -- what a model sees --------------------------------------------------------------------------------------------

    def batch(self, part: Texts, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens, without the padding that all of these examples have, and their classes."""
        return part.tokens[index, : max(1, int(part.lengths[index].max()))], self.labels(part, index)

    def arranged(self, part: Texts, index: Tensor) -> Tensor:
        return index[part.lengths[index].argsort(stable=True)]

    def outputs(self, x: Tensor) -> Tensor:
        return x

    def read_files(self, files: Sequence[str | Path]) -> tuple[list[str], Tensor]:
        """Each line of files of texts, cut to the model's length."""
        names, rows = [], []
        for file in files:
            if Path(file).suffix.lower() != ".txt":
                raise ValueError(f"{file}: texts to be scored stand in a .txt file, one a line")
            for number, line in enumerate(text_data.lines(Path(file)), 1):
                ids = self.tokenizer.encode(line.strip())[: self.shape[0]]
                if ids:
                    names.append(f"{file}:{number}")
                    rows.append(ids + [PAD] * (self.shape[0] - len(ids)))
        if not rows:
            raise ValueError(f"there are no texts in {', '.join(map(str, files))}")
        return names, torch.tensor(rows)

    def known_words(self, text: str) -> list[int]:
        """The tokens of a text, all of them known.

        Raises:
            ValueError: one is not in the vocabulary; says which.
        """
        ids = self.tokenizer.encode(text)
        if UNKNOWN in ids:
            strange = [word for word in text.split() if UNKNOWN in self.tokenizer.encode(word)] or [text]
            raise ValueError(f"not in the model's vocabulary: {', '.join(map(repr, strange[:5]))}")
        return ids

    def given(self, prompt: str | None, infill: str | None, length: int | None) -> tuple[Tensor | None, int | None]:
        """What is given of texts that are to be drawn: tokens (L,), -1 where one is drawn, and their length if asked.

        Args:
            prompt: how they begin.
            infill: a text with "_" for each token that is to be drawn; it has just as many tokens, or ``length``.

        Raises:
            ValueError: words that are not in the vocabulary, more tokens than there is room for, or no such length.
        """
        longest = self.shape[0]
        if not isinstance(prompt, str | None):
            raise ValueError("texts take one prompt, with which each begins; several are for captioned images")
        if prompt is not None and infill is not None:
            raise ValueError(
                "give either a prompt or a text to fill in: a prompt is one that is filled in after its end"
            )
        if length is not None and not 1 <= length <= longest:
            raise ValueError(f"length must lie in 1 to {longest}, the longest text of this model; got {length}")
        text, what = (prompt, "prompt") if infill is None else (infill, "text to fill in")
        if text is None:
            return None, length
        ids: list[int] = []
        if infill is not None and self.tokenizer.kind == "bpe":
            text = re.sub(f" ({BLANK})", r"\1", text)  # there the space before a word is part of its token
        for part in re.split(f"({BLANK})", text) if infill is not None else [text]:
            ids += [-1] if infill is not None and part == BLANK else self.known_words(part)
        room = longest if length is None else length
        if not ids:
            raise ValueError(f"the {what} is empty")
        if len(ids) > room:
            raise ValueError(f"the {what} has {len(ids)} tokens, and the text has room for {room}")
        known = torch.full((longest,), -1)
        known[: len(ids)] = torch.tensor(ids)
        return known, len(ids) if infill is not None and length is None else length

    def words(self, tokens: Tensor) -> str:
        """A text of tokens, "_" where one is the mask or another state beyond the vocabulary."""
        if int(tokens.max()) < self.levels:
            return self.tokenizer.decode(tokens.tolist())
        return " ".join(self.tokenizer.decode([i]) if i < self.levels else "_" for i in tokens.tolist() if i != PAD)

    # -- likelihoods --------------------------------------------------------------------------------------------------

    def in_other_units(self, total: float, x: Tensor) -> dict[str, float]:
        """For each predicted token: those of the texts, and an end where it is shorter than the longest may be."""
        lengths = lengths_of(x)
        predicted = (lengths + (lengths < self.shape[0])).double().mean()
        nats = total / float(predicted)
        return {"nats_per_token": nats, "perplexity": math.exp(nats) if nats < 700 else math.inf}

    def baselines(self, x: Tensor) -> dict[str, float]:
        x = torch.nn.functional.pad(x, (0, self.shape[0] - x.shape[1]), value=PAD)
        return {
            f"{name} of the training texts": -float(self.ngrams[order].log_prob(x, lengths_of(x)).mean())
            for order, name in enumerate(("unigrams", "bigrams", "trigrams"), 1)
        }

    # -- samples ------------------------------------------------------------------------------------------------------

    def save(self, sample: Tensor, path: Path, notes: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.words(sample) + "\n", "utf-8")

    def sheet(
        self, samples: Sequence[Path] | Tensor, path: Path, columns: int | None, notes: Mapping[str, Any]
    ) -> Path:
        """One line for each text."""
        if isinstance(samples, Tensor):
            lines = [self.words(one) for one in samples]
        else:
            lines = [file.read_text("utf-8").rstrip("\n") for file in samples]
        path = path.with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line.replace("\n", "\\n") + "\n" for line in lines), "utf-8")
        return path

    def glimpse(self, samples: Sequence[Mapping[str, Any]], most: int = 16) -> str:
        width = max(len(one.get("class", "")) for one in samples)
        lines = []
        for one in samples[:most]:
            name = f"{one['class']:{width}}  " if width else ""
            lines.append(name + Path(one["file"]).read_text("utf-8").rstrip("\n"))
        return "\n".join([*lines, "...", ""] if len(samples) > most else [*lines, "", ""])

    # -- judging ------------------------------------------------------------------------------------------------------

    def trained_judge(self) -> TextJudge:
        kept = self.folder / "judge"
        if kept.is_dir():
            return TextJudge.load(kept)
        if not self.info["classes"]:
            raise ValueError("the texts have no classes, and the judge is a classifier")
        to_stderr("training the judge of real texts ...")
        judge = TextJudge.train(self.data)
        judge.save(kept)
        return judge

    @cached_property
    def ngrams(self) -> dict[int, NGram]:
        """N-grams of the training texts, of orders 1 to 3; the last is what fluency is measured by."""
        train = self.data.train
        orders = range(1, ORDER + 1)
        return {order: NGram(order).fit(train.tokens, train.lengths, self.data.tokenizer.size) for order in orders}

    @cached_property
    def _training_texts(self) -> frozenset[str]:
        return frozenset(self.words(row) for row in self.data.train.tokens)

    def quality(self, samples: Tensor, labels: Tensor | None) -> dict[str, Any]:
        held_out = self.data.held_out
        some = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[: len(samples)]
        real = held_out.labels[some] if held_out.labels is not None else None
        return self.measured(samples, labels) | {"held_out": self.measured(held_out.tokens[some], real)}

    def measured(self, tokens: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """Of texts drawn, or real ones, with these classes: success, fluency, variety, lengths, copies."""
        lengths, texts = lengths_of(tokens), [self.words(row) for row in tokens]
        longest = int(lengths.max())
        found: dict[str, Any] = {
            "samples": len(tokens),
            "agreement": None,
            "agreement_error": None,
            "perplexity": self.ngrams[ORDER].perplexity(tokens, lengths),
            "distinct_1": distinct(tokens, lengths, 1) if longest >= 1 else math.nan,
            "distinct_2": distinct(tokens, lengths, 2) if longest >= 2 else math.nan,
            "entropy": entropy(tokens, lengths) if longest >= 1 else math.nan,
            "length": float(lengths.double().mean()),
            "unknown": float((tokens == UNKNOWN).sum() / lengths.sum().clamp_min(1)),
            "copied": copied(texts, self._training_texts),
        }
        if self.judge is not None:
            judged, _ = self.judge.predict(texts)
            names = self.judge.classes
            found["classes"] = {name: float((judged == i).double().mean()) for i, name in enumerate(names)}
            if labels is not None:
                share = float((judged == labels).double().mean())
                found |= {"agreement": share, "agreement_error": math.sqrt(share * (1 - share) / len(tokens))}
        return found

    def quality_in_words(self, quality: Mapping[str, Any]) -> list[str]:
        real = quality["held_out"]
        rows = [
            ("texts", "samples", "d"),
            ("judged as the class asked for", "agreement", ".1%"),
            (f"perplexity, by {ORDER}-grams of real texts", "perplexity", ",.0f"),
            ("distinct words", "distinct_1", ".1%"),
            ("distinct pairs of words", "distinct_2", ".1%"),
            ("entropy of words, nats", "entropy", ".2f"),
            ("length, tokens", "length", ".1f"),
            ("unknown tokens", "unknown", ".1%"),
            ("also a training text", "copied", ".1%"),
        ]
        lines = [f"{'quality':40s}{'samples':>10s}{'real':>10s}"]
        lines += [
            f"{'  ' + name:40s}{format(quality[key], how):>10s}{format(real[key], how):>10s}"
            for name, key, how in rows
            if quality[key] is not None
        ]
        if "classes" in quality:
            shares = "  ".join(f"{name} {share:.0%}" for name, share in quality["classes"].items())
            lines.append(f"  classes: {shares}")
        return lines


def lengths_of(tokens: Tensor) -> Tensor:
    """How many tokens stand before the first padding, (N,)."""
    return (tokens != PAD).cumprod(1).sum(1)

"""Recordings with what is said in them as a medium: whole mels, told the phonemes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kuosan.recipe import Data, RecipeError
from kuosan.speech.data import Clips, SpeechData
from kuosan.speech.judge import word_error_rate
from kuosan.speech.medium import SpeechMedium, speed_in_words, with_error
from kuosan.speech.phonemes import encode
from kuosan.speech.states import told


class TranscribedMedium(SpeechMedium):
    """Recordings whose words are known. An example is a whole mel, padded with columns of 0, told its text."""

    one, many = "recording", "recordings"

    @staticmethod
    def read(section: Data) -> SpeechData:
        """The recordings whose transcripts can be read, as phonemes.

        Raises:
            RecipeError: nothing is known of what is said, or no transcript of a part can be read.
        """
        assert section.speech is not None
        data = SpeechMedium.read(section)
        hop, parts, notes = section.speech.hop, {}, list(data.notes)
        for name in ("train", "held_out"):
            parts[name], note = _readable(getattr(data, name), hop, data.rate)
            if not len(parts[name]):
                raise RecipeError(
                    f"data: {data.name} has no {name.replace('_', '-')} recording with words that can be read: {note}; "
                    "texts stand in a metadata.csv, or in a .txt beside each file"
                )
            if note:
                notes.append(f"{name.replace('_', '-')}: {note}")
        return dataclasses.replace(data, train=parts["train"], held_out=parts["held_out"], notes=tuple(notes))

    @staticmethod
    def describe(section: Data, data: SpeechData) -> dict[str, Any]:
        assert section.speech is not None
        found = SpeechMedium.describe(section, data)
        texts = [text for part in (data.train, data.held_out) for text in part.transcripts or ()]
        shape = [section.speech.mels, section.speech.frames]
        return found | {"shape": shape, "parts": [*found["parts"], repr(texts).encode()]}

    def size(self, part: Clips) -> int:
        return len(part)

    def arranged(self, part: Clips, index: Tensor) -> Tensor:
        return index[part.lengths[index].argsort(stable=True)]

    def batch(self, part: Clips, index: Tensor) -> tuple[Tensor, Tensor]:
        mels, texts = self._examples[part is self.data.train]
        chosen = index.tolist()
        x_0 = torch.nn.utils.rnn.pad_sequence([mels[i].T for i in chosen], batch_first=True).mT
        return x_0, torch.nn.utils.rnn.pad_sequence([texts[i] for i in chosen], batch_first=True)

    def heard(self, rows: Mapping[str, Sequence[Tensor]], texts: Sequence[str]) -> dict[str, Any]:
        """How the words of waves are heard, and how long they last, of each row."""
        found: dict[str, Any] = {}
        for name, waves in rows.items():
            rate, error = word_error_rate(texts[: len(waves)], [self.judge(wave) for wave in waves])
            seconds = sum(map(len, waves)) / self.analysis.rate
            found[name] = {"word_error_rate": rate, "word_error_rate_error": error, "seconds": seconds}
            found[name]["utterances"] = len(waves)
        return found

    def quality_in_words(self, quality: Mapping[str, Any]) -> list[str]:
        columns = {"samples": "ours", "analysed": "natural mel", "natural": "natural"}
        rates = [(quality[name]["word_error_rate"], quality[name]["word_error_rate_error"]) for name in columns]
        lines = [
            f"{'quality, ± over utterances':34s}" + "".join(f"{name:>18s}" for name in columns.values()),
            f"  {'word error rate':32s}" + "".join(f"{with_error(*one, '.3f'):>18s}" for one in rates),
            f"  {'seconds':32s}" + "".join(f"{quality[name]['seconds']:>18.1f}" for name in columns),
        ]
        return [*lines, *speed_in_words(quality), f"  ({quality['samples']['utterances']} utterances)"]

    @cached_property
    def _examples(self) -> dict[bool, tuple[list[Tensor], list[Tensor]]]:
        """Mels, as networks see them, and symbols of the training part (True) and of the held-out one."""
        found = {}
        for training, part in ((True, self.data.train), (False, self.data.held_out)):
            mels = [told(self.analysis.mel(wave[None]))[0] for wave in part.waves]
            found[training] = mels, [torch.tensor(encode(text)) for text in part.transcripts or ()]
        return found


#: Seconds of a recording: what is aligned in one piece takes memory by its square.
LONGEST = 60


def _readable(part: Clips, hop: int, rate: int) -> tuple[Clips, str]:
    """The clips whose transcript can be read and is not too long for them, and what is to be said of the others."""
    kept, why = [], []
    for i, text in enumerate(part.transcripts or ()):
        if not text.strip():
            continue
        try:
            symbols = len(encode(text))
        except ValueError as error:
            why.append(f"{part.names[i]} ({str(error).split(':')[0]})")
            continue
        if len(part.waves[i]) > LONGEST * rate:
            why.append(f"{part.names[i]} (longer than {LONGEST} s)")
        elif symbols > len(part.waves[i]) // hop:
            why.append(f"{part.names[i]} (too short for its {symbols} symbols)")
        else:
            kept.append(i)
    texts, transcripts = part.texts or [], part.transcripts or []
    found = Clips(
        [part.waves[i] for i in kept],
        [texts[i] for i in kept],
        [transcripts[i] for i in kept],
        [part.names[i] for i in kept],
        part.lengths[kept],
    )
    more = f" and {len(why) - 5:,} more" if len(why) > 5 else ""
    left = len(part) - len(kept) - len(why)
    notes = [f"{left:,} recordings without words were left out"] if left else []
    if why:
        notes.append(f"{len(why):,} recordings could not be used and were left out: {', '.join(why[:5])}{more}")
    return found, "; ".join(notes)

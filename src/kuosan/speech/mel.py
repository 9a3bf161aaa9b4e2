"""A mel as a file: its numbers with the constants that they were made with, so that no other is taken for it."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kuosan.speech.analysis import Analysis


@dataclass(frozen=True)
class Mel:
    """The log-mel of one wave.

    Args:
        values: float32 (M, T), as :meth:`Analysis.mel` gives them.
        analysis: the constants that they were made with.
        samples: of the wave, which has T frames.
        name: of what it is a mel of.

    Raises:
        ValueError: values of another shape or not finite, or a wave of so many samples has not T frames.
    """

    values: Tensor
    analysis: Analysis
    samples: int
    name: str = "mel"
    #: Of its file.
    suffix: ClassVar[str] = ".npz"

    def __post_init__(self):
        if self.values.ndim != 2 or len(self.values) != self.analysis.mels:
            raise ValueError(f"a mel of this analysis is ({self.analysis.mels}, T), got {tuple(self.values.shape)}")
        if self.analysis.frames(self.samples) != self.values.shape[1]:
            raise ValueError(
                f"{self.samples} samples have {self.analysis.frames(self.samples)} frames, "
                f"and the mel has {self.values.shape[1]}"
            )
        if not bool(self.values.isfinite().all()):
            raise ValueError("a mel has values that are not finite")

    @classmethod
    def of(cls, wave: Tensor, analysis: Analysis, name: str = "mel") -> Mel:
        """Of a wave (N,)."""
        return cls(analysis.mel(wave[None].float())[0], analysis, len(wave), name)

    def griffin_lim(self, iterations: int = 32) -> Tensor:
        """A wave (samples,) with about that mel: smooth magnitudes that have it, and phases by Griffin-Lim."""
        mel = self.values[None]
        magnitude = self.analysis.with_mel(self.analysis.envelope(mel), mel)
        return self.analysis.griffin_lim(magnitude, iterations, n=self.samples)[0]

    def save(self, path: str | Path) -> Path:
        """Write it to a .npz file: the arrays ``mel`` and ``samples``, and ``analysis``, the constants as JSON."""
        path = Path(path)
        if path.suffix != self.suffix:
            raise ValueError(f"a mel is kept in a {self.suffix} file, got {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        constants = json.dumps(self.analysis.plain())
        np.savez(path, mel=self.values.cpu().numpy(), samples=self.samples, analysis=constants)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Mel:
        """Raises FileNotFoundError, or ValueError: it is no such file, or says nothing of its constants."""
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as kept:
                missing = {"mel", "samples", "analysis"} - set(kept.files)
                if missing:
                    raise ValueError(f"it lacks {', '.join(sorted(missing))}: which constants made it is not known")
                analysis = Analysis.from_plain(json.loads(str(kept["analysis"])))
                return cls(torch.from_numpy(kept["mel"]).float(), analysis, int(kept["samples"]), path.stem)
        except (ValueError, TypeError, AttributeError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path} is not the file of a mel: {error}") from None

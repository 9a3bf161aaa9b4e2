"""What a report measures of a run: each section's numbers and pictures, within a budget of time."""

from kuosan.measurements.autoencoder import AutoencoderMeasurements
from kuosan.measurements.base import Measurements
from kuosan.measurements.diffusion import DiffusionMeasurements
from kuosan.measurements.embedding import EmbeddingMeasurements
from kuosan.measurements.images import ImageMeasurements
from kuosan.measurements.latent import LatentMeasurements
from kuosan.measurements.speech import VocoderMeasurements
from kuosan.measurements.spoken import TextToSpeechMeasurements
from kuosan.measurements.text import AutoregressiveMeasurements, DiscreteMeasurements, TextMeasurements
from kuosan.runs import (
    AutoencoderRun,
    AutoregressiveRun,
    DiffusionRun,
    DiscreteRun,
    EmbeddingRun,
    LatentRun,
    Run,
    TextToSpeechRun,
    VocoderRun,
)

#: Of each kind of run.
KINDS: dict[type[Run], type[Measurements]] = {
    EmbeddingRun: EmbeddingMeasurements,
    VocoderRun: VocoderMeasurements,
    TextToSpeechRun: TextToSpeechMeasurements,
    LatentRun: LatentMeasurements,
    DiffusionRun: DiffusionMeasurements,
    AutoencoderRun: AutoencoderMeasurements,
    DiscreteRun: DiscreteMeasurements,
    AutoregressiveRun: AutoregressiveMeasurements,
}


def measurements_of(run: Run, budget: float) -> Measurements:
    """The measurements of a run, of its kind.

    Args:
        budget: about how many seconds they may take.
    """
    return next(measurements for kind, measurements in KINDS.items() if isinstance(run, kind))(run, budget)


__all__ = [
    "AutoencoderMeasurements",
    "AutoregressiveMeasurements",
    "DiffusionMeasurements",
    "DiscreteMeasurements",
    "EmbeddingMeasurements",
    "ImageMeasurements",
    "LatentMeasurements",
    "Measurements",
    "TextMeasurements",
    "TextToSpeechMeasurements",
    "VocoderMeasurements",
    "measurements_of",
]

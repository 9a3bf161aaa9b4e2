"""What a report measures of a run: each section's numbers and pictures, within a budget of time."""

from kuosan.measurements.autoencoder import AutoencoderMeasurements
from kuosan.measurements.base import Measurements
from kuosan.measurements.diffusion import DiffusionMeasurements
from kuosan.runs import DiffusionRun, Run


def measurements_of(run: Run, budget: float) -> Measurements:
    """The measurements of a run, of its kind.

    Args:
        budget: about how many seconds they may take.
    """
    return (DiffusionMeasurements if isinstance(run, DiffusionRun) else AutoencoderMeasurements)(run, budget)


__all__ = ["AutoencoderMeasurements", "DiffusionMeasurements", "Measurements", "measurements_of"]

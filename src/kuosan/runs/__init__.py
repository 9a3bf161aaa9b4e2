"""Runs: folders that explain themselves. Load one and sample, tune, evaluate or report."""

from pathlib import Path

from kuosan import recipe as recipes
from kuosan.recipe import Recipe
from kuosan.runs.autoencoder import AutoencoderRun
from kuosan.runs.diffusion import DiffusionRun, unmeasured_solver
from kuosan.runs.run import Run, RunError, device, read_data, write


def kind_of(recipe: Recipe) -> type[Run]:
    """The class of a recipe's runs."""
    return DiffusionRun if recipe.autoencoder is None else AutoencoderRun


def load(folder: str | Path) -> Run:
    """A run from its folder.

    Raises:
        RunError: the folder is not a run.
    """
    path = Path(folder) / "recipe.toml"
    kind = kind_of(recipes.read(path)) if path.is_file() else DiffusionRun
    return kind.open(folder)


__all__ = [
    "AutoencoderRun",
    "DiffusionRun",
    "Run",
    "RunError",
    "device",
    "kind_of",
    "load",
    "read_data",
    "unmeasured_solver",
    "write",
]

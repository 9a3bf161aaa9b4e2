"""Runs: folders that explain themselves. Load one and sample, tune, evaluate or report."""

from pathlib import Path

from kuosan import recipe as recipes
from kuosan.recipe import Recipe
from kuosan.runs.autoencoder import AutoencoderRun
from kuosan.runs.diffusion import DiffusionRun, unmeasured_solver
from kuosan.runs.embedding import EmbeddingRun
from kuosan.runs.latent import LatentRun
from kuosan.runs.run import FAMILIES, Run, RunError, device, write
from kuosan.runs.speech import SpeechRun
from kuosan.runs.text_to_speech import TextToSpeechRun
from kuosan.runs.tokens import AutoregressiveRun, DiscreteRun, TokenRun
from kuosan.runs.vocoder import VocoderRun

#: The class of each kind of model's runs.
KINDS: tuple[type[Run], ...] = (
    EmbeddingRun,
    VocoderRun,
    TextToSpeechRun,
    LatentRun,
    DiffusionRun,
    AutoencoderRun,
    DiscreteRun,
    AutoregressiveRun,
)


def kind_of(recipe: Recipe) -> type[Run]:
    """The class of a recipe's runs."""
    return next(kind for kind in KINDS if recipe.family in kind.families)


def load(folder: str | Path) -> Run:
    """A run from its folder.

    Raises:
        RunError: the folder is not a run.
    """
    path = Path(folder) / "recipe.toml"
    kind = kind_of(recipes.read(path)) if path.is_file() else DiffusionRun
    return kind.open(folder)


def load_diffusion(folder: str | Path) -> DiffusionRun:
    """The run of a Gaussian diffusion model: one that solvers and tables are for.

    Raises:
        RunError: the folder is not a run, or one of another kind of model.
    """
    run = load(folder)
    if not isinstance(run, DiffusionRun):
        raise RunError(f"{folder} is the run of {FAMILIES[run.recipe.family]}, which has no such thing")
    return run


__all__ = [
    "AutoencoderRun",
    "AutoregressiveRun",
    "DiffusionRun",
    "DiscreteRun",
    "EmbeddingRun",
    "LatentRun",
    "Run",
    "RunError",
    "SpeechRun",
    "TextToSpeechRun",
    "TokenRun",
    "VocoderRun",
    "device",
    "kind_of",
    "load",
    "load_diffusion",
    "unmeasured_solver",
    "write",
]

"""Kuosan (扩散): one toolkit for the whole family of diffusion models.

``import kuosan as ks``; everything is reached from here and loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kuosan import networks, objectives, schedules, solvers
    from kuosan.autoencoders import Autoencoder
    from kuosan.bound import Bound
    from kuosan.chain import Chain
    from kuosan.denoiser import EDM, Denoiser
    from kuosan.diffusion import DiffusionChain
    from kuosan.gaussian import Gaussian
    from kuosan.mixture import Mixture
    from kuosan.prediction import Prediction
    from kuosan.process import Grid, Process
    from kuosan.runs import Run, load
    from kuosan.solvers import ClassifierFree, Table, sample

_HOME = {
    "Autoencoder": "autoencoders",
    "ClassifierFree": "solvers",
    "Bound": "bound",
    "Chain": "chain",
    "Denoiser": "denoiser",
    "DiffusionChain": "diffusion",
    "EDM": "denoiser",
    "Gaussian": "gaussian",
    "Grid": "process",
    "Mixture": "mixture",
    "Prediction": "prediction",
    "Process": "process",
    "Run": "runs",
    "Table": "solvers",
    "load": "runs",
    "sample": "solvers",
}
_MODULES = ("networks", "objectives", "schedules", "solvers")

__version__ = "0.1.0"
__all__ = [
    "EDM",
    "Autoencoder",
    "Bound",
    "Chain",
    "ClassifierFree",
    "Denoiser",
    "DiffusionChain",
    "Gaussian",
    "Grid",
    "Mixture",
    "Prediction",
    "Process",
    "Run",
    "Table",
    "load",
    "networks",
    "objectives",
    "sample",
    "schedules",
    "solvers",
]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"kuosan.{name}")
    if name in _HOME:
        return getattr(import_module(f"kuosan.{_HOME[name]}"), name)
    raise AttributeError(f"kuosan has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__

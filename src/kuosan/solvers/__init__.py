"""Samplers: coefficient rules that make tables, the one executor that runs them, and guidance that wraps denoisers."""

from kuosan.solvers.ancestral import Ancestral
from kuosan.solvers.ddim import DDIM
from kuosan.solvers.executor import Model, Noise, check_seeds, run, sample
from kuosan.solvers.guidance import ClassifierFree
from kuosan.solvers.table import Row, Solver, Table

#: The solvers that recipes and the command line know by name.
SOLVERS: dict[str, type[Solver]] = {"ddim": DDIM, "ancestral": Ancestral}

__all__ = [
    "DDIM",
    "SOLVERS",
    "Ancestral",
    "ClassifierFree",
    "Model",
    "Noise",
    "Row",
    "Solver",
    "Table",
    "check_seeds",
    "run",
    "sample",
]

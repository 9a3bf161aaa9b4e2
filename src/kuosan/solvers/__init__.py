"""Samplers: coefficient rules that make tables, the one executor that runs them, and guidance that wraps denoisers."""

from kuosan.solvers.ancestral import Ancestral
from kuosan.solvers.auto import Auto
from kuosan.solvers.correctors import MALA, Corrector, Langevin, annealed
from kuosan.solvers.ddim import DDIM
from kuosan.solvers.dpm_solver import DPMSolver, DPMSolverPP, UniPC
from kuosan.solvers.energies import Product, energy_of
from kuosan.solvers.executor import Model, run
from kuosan.solvers.grids import (
    GRIDS,
    Karras,
    LinearBetaTime,
    Quadratic,
    Rectified,
    Spacing,
    UniformLogSNR,
    UniformTime,
)
from kuosan.solvers.guidance import Autoguidance, ClassifierFree, ClassifierGuidance
from kuosan.solvers.inpainting import Inpainting
from kuosan.solvers.multistep import DEIS, AdamsBashforth
from kuosan.solvers.runge_kutta import RK4, Euler, Heun, Midpoint
from kuosan.solvers.sampling import Noise, SamplingError, check_seeds, sample, sample_batches
from kuosan.solvers.stochastic import EDMHeun, EulerMaruyama
from kuosan.solvers.table import Row, Solver, Table
from kuosan.solvers.transforms import Clip, DynamicThreshold
from kuosan.solvers.tuning import Errors, Tuned, tune

#: The solvers that recipes and the command line know by name.
SOLVERS: dict[str, type[Solver]] = {
    "auto": Auto,
    "ddim": DDIM,
    "ancestral": Ancestral,
    "euler": Euler,
    "midpoint": Midpoint,
    "heun": Heun,
    "rk4": RK4,
    "adams_bashforth": AdamsBashforth,
    "deis": DEIS,
    "dpm_solver": DPMSolver,
    "dpm_solver++": DPMSolverPP,
    "unipc": UniPC,
    "euler_maruyama": EulerMaruyama,
    "edm": EDMHeun,
}

#: And the correctors.
CORRECTORS: dict[str, type[Corrector]] = {"langevin": Langevin, "mala": MALA}

__all__ = [
    "CORRECTORS",
    "DDIM",
    "DEIS",
    "GRIDS",
    "MALA",
    "RK4",
    "SOLVERS",
    "AdamsBashforth",
    "Ancestral",
    "Auto",
    "Autoguidance",
    "ClassifierFree",
    "ClassifierGuidance",
    "Clip",
    "Corrector",
    "DPMSolver",
    "DPMSolverPP",
    "DynamicThreshold",
    "EDMHeun",
    "Errors",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Inpainting",
    "Karras",
    "Langevin",
    "LinearBetaTime",
    "Midpoint",
    "Model",
    "Noise",
    "Product",
    "Quadratic",
    "Rectified",
    "Row",
    "SamplingError",
    "Solver",
    "Spacing",
    "Table",
    "Tuned",
    "UniPC",
    "UniformLogSNR",
    "UniformTime",
    "annealed",
    "check_seeds",
    "energy_of",
    "run",
    "sample",
    "sample_batches",
    "tune",
]

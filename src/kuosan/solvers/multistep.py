"""Multistep solvers of the ODE: one evaluation per step, and a polynomial through the last outputs."""

from __future__ import annotations

from dataclasses import dataclass

from kuosan.solvers.grids import LinearBetaTime
from kuosan.solvers.table import Row, Solver
from kuosan.solvers.variables import CLOCKS, check_variable, output_scale, scale_at, to_data, weights


@dataclass(frozen=True)
class AdamsBashforth(Solver):
    r"""Adams-Bashforth in any variable of the ODE (:mod:`kuosan.solvers.variables`).

    .. math:: x_s = \frac{g_s}{g_t} x_t + g_s \sum_j m_j \int_{w_t}^{w_s} \ell_j(p(w))\,\mathrm dw

    with the polynomial through the outputs of the last ``order`` evaluations. The first steps have lower order. Where
    that integral would leave noise at the data, in v and velocity, the step there is the end of a polynomial through
    the model's x0 (:func:`~kuosan.solvers.variables.to_data`); where its clock never reaches the data, in x0 or with
    ``log_snr``, the model's last x0.

    Args:
        order: 1 to 4 (1: DDIM, in every variable but velocity).
        variable: "flow" (eps - x0), "x0", "eps", "v", or "velocity" (of the schedule's own time).
        polynomial: in which clock: "own" (w itself), "log_snr" (with x0: an exponential integrator), "flow", "time"
            (with eps: DEIS, Zhang and Chen 2022, arXiv 2204.13902).

    Raises:
        ValueError: an order outside 1 to 4, an unknown variable or polynomial.
    """

    order: int = 2
    variable: str = "flow"
    polynomial: str = "own"
    spacing = LinearBetaTime()

    def __post_init__(self):
        check_variable(self.variable)
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"Adams-Bashforth has order 1 to 4, got {self.order}")
        if self.polynomial not in CLOCKS:
            raise ValueError(f"polynomial must be in one of {', '.join(CLOCKS)}, got {self.polynomial!r}")

    @property
    def form(self) -> str:  # type: ignore[override]
        return self.variable

    @property
    def needs_signal(self) -> bool:
        return self.variable == "eps" or self.polynomial == "log_snr"

    def rows(self, process, grid):
        straight = self.variable in ("flow", "eps") or (self.variable == "x0" and self.polynomial in ("flow", "time"))
        for i, (t, s) in enumerate(grid.pairs()):
            nodes = grid.times[max(0, i + 1 - self.order) : i + 1][::-1]  # newest first
            if s == 0 and (not straight or self.polynomial == "log_snr"):
                smooth = self.variable in ("v", "velocity") and self.polynomial != "log_snr"
                yield to_data(self.variable, process, *(nodes if smooth else nodes[:1]))
                return
            m = weights(self.variable, self.polynomial, process, nodes, t, s)
            m = [c * output_scale(self.variable, process, u) for c, u in zip(m, nodes, strict=True)]
            yield Row(t, x=scale_at(self.variable, process, s) / scale_at(self.variable, process, t), m=tuple(m))


@dataclass(frozen=True)
class DEIS(AdamsBashforth):
    """Diffusion exponential integrator (Zhang and Chen 2022, arXiv 2204.13902): tAB-DEIS.

    Adams-Bashforth on the noise, with polynomials in the schedule's time; ``polynomial="own"`` is rhoAB-DEIS.
    """

    order: int = 3
    variable: str = "eps"
    polynomial: str = "time"

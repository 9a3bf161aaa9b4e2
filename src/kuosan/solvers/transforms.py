"""Transforms of x0-hat, applied by the executor before a step uses it: ``transform=`` of run and sample."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """Every x0-hat kept within the range of the data (Ho et al. 2020, arXiv 2006.11239, in its code; static clipping).

    Args:
        low, high: of the data.

    Raises:
        ValueError: low is not under high.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"clipping needs low < high, got {self.low} and {self.high}")

    def __call__(self, x_0: Tensor) -> Tensor:
        return x_0.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold:
    r"""Dynamic thresholding (Saharia et al. 2022, Imagen, arXiv 2205.11487, sec. 2.3): against saturated samples.

    .. math:: \hat x_0 \leftarrow \frac bs\,\mathrm{clip}(\hat x_0, -s, s),
        \qquad s = \max(b,\ \text{the quantile of } |\hat x_0| \text{ within the sample})

    Args:
        quantile: of each sample's absolute values.
        bound: b, the largest absolute value of the data.

    Raises:
        ValueError: quantile outside [0, 1], or a bound that is not positive.
    """

    quantile: float = 0.995
    bound: float = 1.0

    def __post_init__(self):
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must lie in [0, 1], got {self.quantile}")
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}")

    def __call__(self, x_0: Tensor) -> Tensor:
        ordered = x_0.abs().flatten(1).sort(1).values  # torch.quantile refuses large batches
        place = self.quantile * (ordered.shape[1] - 1)
        below = ordered[:, int(place)]
        above = ordered[:, min(int(place) + 1, ordered.shape[1] - 1)]
        s = below.lerp(above, place % 1).clamp_min(self.bound).reshape(-1, *(1,) * (x_0.ndim - 1))
        return x_0.clamp(-s, s) * (self.bound / s)

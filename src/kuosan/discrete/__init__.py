"""Diffusion over tokens: categorical processes, their denoisers, ladders and samplers (theory row 21)."""

from kuosan.discrete.chain import CategoricalChain
from kuosan.discrete.denoiser import CategoricalDenoiser
from kuosan.discrete.process import CategoricalProcess

__all__ = ["CategoricalChain", "CategoricalDenoiser", "CategoricalProcess"]

"""Diffusion over tokens: categorical processes, their denoisers, ladders and samplers (theory row 21)."""

from kuosan.discrete.chain import CategoricalChain
from kuosan.discrete.denoiser import CategoricalDenoiser
from kuosan.discrete.process import CategoricalProcess
from kuosan.discrete.rules import RULES, Ancestral, Confident, Euler, Remasking, TokenRule
from kuosan.discrete.sampling import Drawn, Sharpened, TokenGuidance, expected_evaluations, sample_tokens

__all__ = [
    "RULES",
    "Ancestral",
    "CategoricalChain",
    "CategoricalDenoiser",
    "CategoricalProcess",
    "Confident",
    "Drawn",
    "Euler",
    "Remasking",
    "Sharpened",
    "TokenGuidance",
    "TokenRule",
    "expected_evaluations",
    "sample_tokens",
]

"""Diffusion over tokens: categorical processes, embeddings, and the autoregressive twin (theory rows 20 and 21)."""

from kuosan.discrete.autoregressive import (
    Autoregressive,
    AutoregressiveChain,
    AutoregressiveGuidance,
    sample_left_to_right,
)
from kuosan.discrete.blocks import sample_blocks
from kuosan.discrete.chain import CategoricalChain
from kuosan.discrete.denoiser import CategoricalDenoiser
from kuosan.discrete.embedding import Clamp, EmbeddingDenoiser, WordEmbedding, sample_words
from kuosan.discrete.embedding_chain import EmbeddingChain
from kuosan.discrete.lengths import Lengths
from kuosan.discrete.process import CategoricalProcess
from kuosan.discrete.risk import minimum_risk
from kuosan.discrete.rules import RULES, Ancestral, Confident, Euler, Remasking, TokenRule
from kuosan.discrete.sampling import Drawn, Sharpened, TokenGuidance, expected_evaluations, sample_tokens

__all__ = [
    "RULES",
    "Ancestral",
    "Autoregressive",
    "AutoregressiveChain",
    "AutoregressiveGuidance",
    "CategoricalChain",
    "CategoricalDenoiser",
    "CategoricalProcess",
    "Clamp",
    "Confident",
    "Drawn",
    "EmbeddingChain",
    "EmbeddingDenoiser",
    "Euler",
    "Lengths",
    "Remasking",
    "Sharpened",
    "TokenGuidance",
    "TokenRule",
    "WordEmbedding",
    "expected_evaluations",
    "minimum_risk",
    "sample_blocks",
    "sample_left_to_right",
    "sample_tokens",
    "sample_words",
]

"""Networks, few and readable: called as ``network(x, t, condition)``; any other module of that shape will do."""

from collections.abc import Callable

from kuosan.networks.energy import Energy
from kuosan.networks.mlp import MLP
from kuosan.networks.parts import Embedding
from kuosan.networks.precision import BFloat16
from kuosan.networks.transformer import Transformer

#: The networks that recipes know by name.
NETWORKS: dict[str, Callable] = {"mlp": MLP, "transformer": Transformer}

__all__ = ["MLP", "NETWORKS", "BFloat16", "Embedding", "Energy", "Transformer"]

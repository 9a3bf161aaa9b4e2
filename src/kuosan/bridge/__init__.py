"""The bridge to diffusers: what its files say, in this package's nouns; and runs of this package, for its pipelines.

Nothing here imports diffusers before it is asked for something that needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Names that are imported when they are asked for, and from where.
LATER = {
    "scheduler_of": "kuosan.bridge.export",
    "generators": "kuosan.bridge.export",
    "import_pipeline": "kuosan.bridge.importing",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)

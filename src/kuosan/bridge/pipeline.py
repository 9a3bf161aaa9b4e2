"""The folder of a pipeline that diffusers saved: what is configured in it, its weights, and what is wrong with them.

What is read are JSON, safetensors and a tokenizer's files. No pickle is opened, and nothing in the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kuosan.bridge.fields import NO_EFFECT
from kuosan.bridge.networks import TEXT, UNCONDITIONAL, class_of
from kuosan.training.checkpoint import PICKLES


class PipelineError(ValueError):
    """A folder that is no pipeline which can be read; says the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Kind:
    """What a class of pipelines is made of, and how its ``__call__`` samples where nobody says.

    Args:
        network: the component that is the denoiser.
        classes: of diffusers that it may be.
        autoencoder: the component, of latent pipelines.
        steps: num_inference_steps.
        guidance: w, one less than guidance_scale.
        scheduler: the class that the pipeline makes of whatever scheduler it is given.
        told: "text", or "class" where it always is.
    """

    network: str
    classes: tuple[str, ...] = ("UNet2DModel",)
    autoencoder: str | None = None
    steps: int = 50
    guidance: float = 0.0
    scheduler: str | None = None
    told: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        found = (self.network, "scheduler", *((self.autoencoder,) if self.autoencoder else ()))
        return (*found, "text_encoder", "tokenizer") if self.told == "text" else found


KINDS = {
    "DDPMPipeline": Kind("unet", steps=1000),
    "DDIMPipeline": Kind("unet", scheduler="DDIMScheduler"),
    "LDMPipeline": Kind("unet", autoencoder="vqvae"),
    "DiTPipeline": Kind("transformer", UNCONDITIONAL[1:], "vae", guidance=3.0, told="class"),
    "StableDiffusionPipeline": Kind("unet", TEXT, "vae", guidance=6.5, told="text"),
}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
LIBRARIES = ("diffusers", "transformers")
#: A tokenizer's files.
TOKENIZER = (
    *("tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "tokenizer.json", "added_tokens.json"),
)
#: Of old text encoders: counted, and not learned.
COMPUTED = "position_ids"


class Folder:
    """A saved pipeline, file by file."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise PipelineError(f"{path}: there is no such folder")
        inside = path.resolve()
        for one in sorted(path.rglob("*")):
            if one.is_symlink() and not one.resolve().is_relative_to(inside):
                raise PipelineError(f"{one}: a link that leads out of the folder is not followed: copy it with cp -rL")
            if one.suffix == ".py":
                raise PipelineError(f"{one}: code that comes with a pipeline is not run, and not imported without")
        if not (path / "model_index.json").is_file():
            raise PipelineError(
                f"{path} is no saved pipeline: it has no model_index.json, which diffusers' save_pretrained writes"
            )
        self.index = self.json("model_index.json")

    def json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            found = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise PipelineError(f"{file} is missing") from None
        except (OSError, ValueError) as error:
            raise PipelineError(f"{file} is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise PipelineError(f"{file} is not a JSON object")
        if "auto_map" in found:
            raise PipelineError(f"{file}: auto_map asks for code of its own, which is not run")
        return found

    def kind(self) -> tuple[str, Kind, tuple[str, ...]]:
        """(the pipeline's class, what is known of it, which components are left out)."""
        file, name = self.path / "model_index.json", self.index.get("_class_name")
        if not isinstance(name, str):
            raise PipelineError(f"{file}: _class_name is {name!r}: code that comes with a pipeline is not run")
        if name not in KINDS:
            raise PipelineError(f"{file}: pipelines that are read are {', '.join(KINDS)}, got {name}")
        kind, left = KINDS[name], []
        listed = {k: v for k, v in self.index.items() if isinstance(v, list) and len(v) == 2 and k[0] != "_"}
        for part, (library, of) in listed.items():
            if library is None or of is None:
                continue
            if part in LEFT_OUT:
                left.append(part)
            elif library not in LIBRARIES:
                more = ": it is the export of a run, which is there itself" if library.startswith("kuosan.") else ""
                raise PipelineError(f"{file}: {part} is of {library}, and code that is not diffusers' is not run{more}")
            elif part not in kind.parts:
                raise PipelineError(f"{file}: {name} has no {part} that is known here: {', '.join(kind.parts)}")
        for part in kind.parts:
            if part not in listed or listed[part][1] is None:
                raise PipelineError(f"{file}: {part} is missing, of which {name} is made")
            if not (self.path / part).is_dir():
                raise PipelineError(f"{self.path / part}: this component's folder is missing")
        return name, kind, tuple(left)

    def config(self, part: str) -> dict[str, Any]:
        """Of a component, without what says nothing of it."""
        found = self.json(f"{part}/{'scheduler_config.json' if part == 'scheduler' else 'config.json'}")
        listed = self.index[part][1]
        if part == "scheduler":
            return found
        if (name := found.get("_class_name", listed)) != listed:
            raise PipelineError(f"{self.path / part}: config.json is of a {name}, and model_index.json of a {listed}")
        return {k: v for k, v in found.items() if k not in ("_name_or_path", *NO_EFFECT)}

    def check_weights(self, part: str) -> None:
        """Raises PipelineError unless there are weights as safetensors, whole."""
        folder, stem = self.path / part, "model" if part == "text_encoder" else "diffusion_pytorch_model"
        name = f"{stem}.safetensors"
        if (folder / f"{name}.index.json").is_file():  # which diffusers takes before the file itself
            of = self.json(f"{part}/{name}.index.json").get("weight_map")
            for shard in sorted(set(of.values())) if isinstance(of, dict) else [""]:
                if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                    raise PipelineError(f"{folder / name}.index.json: {shard!r} is not the name of a file beside it")
                if not (folder / shard).is_file():
                    raise PipelineError(f"{folder / shard} is missing, of which the weights are made")
            return
        if (folder / name).is_file():
            return
        pickles = sorted(one.name for one in folder.iterdir() if one.suffix in PICKLES)
        if pickles:
            raise PipelineError(
                f"{folder / pickles[0]} is a pickle, which could run any code and is not opened: open the pipeline "
                "where you trust it, and save_pretrained(path, safe_serialization=True)"
            )
        others = sorted(one.name for one in folder.glob("*.safetensors"))
        raise PipelineError(f"{folder / name} is missing" + (f"; there is {', '.join(others)}" if others else ""))

    def weights(self, part: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Of a component in float32, by the names that its class has for them.

        Raises:
            PipelineError: weights that are not those of the config.
        """
        self.check_weights(part)
        folder, options = self.path / part, {"use_safetensors": True, "local_files_only": True}
        kind: Any
        if part == "text_encoder":
            from transformers import CLIPTextModel as kind
        else:
            kind = class_of(config, (*UNCONDITIONAL, *TEXT, "AutoencoderKL", "VQModel"))
            options["low_cpu_mem_usage"] = False
        try:
            with quiet():
                model, about = kind.from_pretrained(folder, output_loading_info=True, **options)
        except (RuntimeError, ValueError, OSError, TypeError, KeyError) as error:
            raise PipelineError(f"{folder}: the weights do not fit config.json: {error}") from None
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise PipelineError(f"{folder}: the weights are not safetensors: {error}") from None
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            wrong = sorted(one for one in map(str, about.get(what) or ()) if not one.endswith(COMPUTED))
            if wrong:
                some = f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
                raise PipelineError(f"{folder}: the weights do not fit config.json: {what.replace('_', ' ')} {some}")
        return {
            name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()
        }


@contextmanager
def quiet():
    """Inside, diffusers and transformers say only errors, and show no bars: what is wrong is said here."""
    libraries = []
    for name in LIBRARIES:
        try:
            found = __import__(f"{name}.utils.logging", fromlist=["x"])
        except ImportError:
            continue
        libraries.append((found, found.get_verbosity(), found.is_progress_bar_enabled()))
        found.set_verbosity(found.CRITICAL)
        found.disable_progress_bar()
    try:
        yield
    finally:
        for found, before, shown in libraries:
            found.set_verbosity(before)
            if shown:
                found.enable_progress_bar()

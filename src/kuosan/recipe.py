"""A recipe: everything that defines a training run, in one validated TOML file. Importing it does not import torch."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

#: Kinds of processes of tokens: to a mask, to any token, or away from the end, one token after the other.
TOKEN_PROCESSES = ("masked", "uniform", "autoregressive")


#: Of data, one of them: the keys of a recipe's data that say where they are.
SOURCES = ("name", "folder", "texts", "pipeline")


class RecipeError(ValueError):
    """A recipe that cannot be used: says the file, the key, what was expected and what came."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Count = Annotated[int, Field(ge=1, le=10**9)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Speech(Section):
    """Of recordings: how they are read, the constants of their mel, and what of them is diffused."""

    state: Annotated[
        Literal["magnitude", "spectrum", "wave", "mel"],
        Field(
            description="what is diffused: log-magnitudes, complex spectra or the wave itself, given the mel; or the "
            "mel, given the text"
        ),
    ] = "magnitude"
    frames: Annotated[int, Field(ge=1, le=4096, description="frames of the mel in a training window")] = 64
    trim: Annotated[bool, Field(description="take off silence at both ends of a recording")] = False
    rate: Annotated[int, Field(ge=1000, le=192_000, description="samples a second that recordings are brought to")] = (
        16000
    )
    n_fft: Annotated[int, Field(ge=16, le=2**16, description="samples of a frame, and of its window")] = 1024
    hop: Annotated[Count, Field(description="samples from a frame to the next, at most n_fft / 4")] = 256
    mels: Annotated[Count, Field(description="rows of the mel")] = 80
    low: Annotated[float, Field(ge=0, description="where the lowest of them begins, in Hz")] = 0.0
    high: Annotated[Positive, Field(description="where the highest ends, in Hz")] = 8000.0
    floor: Annotated[Positive, Field(description="what the logarithm does not go below")] = 1e-5


class CaptionsSection(Section):
    """Of captioned images: how a caption becomes the tokens that the network is told."""

    length: Annotated[int, Field(ge=1, le=4096, description="tokens of a caption; longer ones are cut to so many")] = 32
    tokens: Annotated[Literal["word", "bpe", "character"], Field(description="what a token of a caption is")] = "word"
    vocabulary: Annotated[Count, Field(description="most tokens that are told apart")] = 5000
    pretrained: Annotated[
        str | None,
        Field(
            description="a text encoder of the library transformers that reads captions, with tokens of its own: a "
            "folder, or an installed package that holds one; none: an encoder that is trained with the network"
        ),
    ] = None


class Data(Section):
    """What to learn: a named data set, a folder of images or recordings, or a file or folder of texts."""

    name: Annotated[
        str | None,
        Field(description="a named data set: digits, mnist, characters, emoji, glosses, tang-poems or asterisk-en"),
    ] = None
    folder: Annotated[
        str | None,
        Field(description="or a folder: of images, whose sub-folders are the classes; with data.speech, of recordings"),
    ] = None
    texts: Annotated[
        str | None, Field(description="or texts: a .txt (one a line), .csv or .jsonl file, or a folder of .txt files")
    ] = None
    pipeline: Annotated[
        str | None, Field(description="or none: the pipeline of diffusers that an imported run came from")
    ] = None
    size: Annotated[
        int | None, Field(ge=1, le=4096, description="side in pixels of a folder's images after crop and resize")
    ] = None
    channels: Annotated[Literal[1, 3], Field(description="1: grey, 3: colour, for a folder")] = 3
    length: Annotated[
        int | None, Field(ge=1, le=4096, description="tokens of a text; longer ones are cut to so many")
    ] = None
    tokens: Annotated[Literal["word", "bpe", "character"], Field(description="what a token of a text is")] = "word"
    vocabulary: Annotated[Count, Field(description="most tokens that are told apart")] = 2500
    text: Annotated[
        str, Field(description="the column of a .csv, or key of a .jsonl, that holds the text or caption")
    ] = "text"
    label: Annotated[str | None, Field(description="and the one that holds its class")] = None
    held_out: Annotated[float, Field(gt=0, lt=1, description="share of your own data kept for measuring")] = 0.05
    conditional: Annotated[bool, Field(description="tell the network each example's class")] = False
    speech: Annotated[Speech | None, Field(description="of recordings: the table data.speech")] = None
    captions: Annotated[
        CaptionsSection | None,
        Field(description="of captioned images: the table data.captions; it tells the network each example's caption"),
    ] = None

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if sum(getattr(self, key) is not None for key in SOURCES) != 1:
            raise ValueError(
                "give name (a named data set), folder (of your own images) or texts (your own), one of them"
            )
        if self.speech is not None and (self.texts is not None or self.conditional):
            raise ValueError("speech is recordings without classes: drop texts and conditional")
        if self.captions is not None and (self.texts is not None or self.speech is not None or self.conditional):
            raise ValueError(
                "captions are of images, and told in the place of classes: drop data.captions, or texts, speech and "
                "conditional"
            )
        if self.folder is not None and self.size is None and self.speech is None:
            raise ValueError("a folder needs size, the side in pixels that its images are cropped and resized to")
        if self.texts is not None and self.length is None:
            raise ValueError("texts need length, the tokens that each is padded or cut to")
        if self.name is not None and self.size is not None:
            raise ValueError("a named data set has its own size: drop size")
        return self

    @property
    def told(self) -> bool:
        """Whether a network is told something of each example: its class or its caption."""
        return self.conditional or self.captions is not None

    def refuse(self, *keys: str, why: str) -> None:
        """Raises RecipeError for the first of these settings that is given; and where there is no data at all."""
        if self.pipeline is not None:
            raise RecipeError(
                "data.pipeline: this run was imported without data. Name pictures with `kuosan evaluate RUN --data`; "
                "or import with --data FOLDER, or override data.folder, for data to train on and hold out"
            )
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise RecipeError(f"data.{key}: is {why}: drop it")


class DenoiserSection(Section):
    """What the network predicts and how it is preconditioned."""

    predicts: Annotated[
        Literal["x0", "eps", "score", "v", "velocity", "flow", "levels", "energy", "words"],
        Field(description="what the network's output means"),
    ] = "v"
    preconditioning: Annotated[Literal["none", "edm"], Field(description="edm: unit variance in and out")] = "none"
    sigma_data: Annotated[Positive, Field(description="standard deviation of the data, for edm")] = 0.5
    learned_variance: Annotated[bool, Field(description="also predict the reverse variance")] = False


class EmbeddingSection(Section):
    """Texts as points of a space: a continuous diffusion model of them (Diffusion-LM)."""

    size: Annotated[int, Field(ge=1, le=2**16, description="dimensions of the space in which words are points")] = 64


class EncoderSection(Section):
    """Of text to speech: phonemes to the mean mel of each and how long it lasts."""

    width: Annotated[int, Field(ge=1, le=2**16, description="of its blocks")] = 192
    depth: Annotated[int, Field(ge=1, le=1000, description="how many there are")] = 4
    kernel: Annotated[int, Field(ge=1, description="symbols that a block sees at once, odd")] = 5
    dropout: Annotated[Share, Field(description="of each block")] = 0.1


class ReaderSection(Section):
    """Of captions: the encoder that is trained with the network."""

    width: Annotated[int, Field(ge=1, le=2**16, description="of its vectors")] = 192
    depth: Annotated[int, Field(ge=1, le=1000, description="how many blocks it has")] = 2
    heads: Annotated[Count, Field(description="of its attention; divides width")] = 4
    dropout: Annotated[Share, Field(description="of each block")] = 0.0


class Training(Section):
    """How long, how fast, and how exactly."""

    steps: Annotated[Count, Field(description="optimiser steps")]
    batch_size: Annotated[int, Field(ge=1, le=2**20, description="examples per step, over all processes")] = 128
    accumulate: Annotated[Count, Field(description="parts that a batch is computed in, to save memory")] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1, description="peak learning rate of AdamW")] = 1e-3
    warmup: Annotated[int, Field(ge=0, description="steps over which the learning rate rises")] = 100
    decay: Annotated[
        Literal["constant", "cosine", "linear"], Field(description="how the learning rate falls afterwards")
    ] = "cosine"
    beta2: Annotated[Share, Field(description="AdamW's second moment")] = 0.99
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0, description="largest gradient norm; 0: no clipping")] = 1.0
    ema: Annotated[Share, Field(description="decay of the averaged weights, which samples are drawn from")] = 0.999
    label_drop: Annotated[Share, Field(description="share of examples that train without their class or caption")] = 0.1
    precision: Annotated[Literal["float32", "bfloat16"], Field(description="of the network's arithmetic")] = "float32"
    channels_last: Annotated[bool, Field(description="memory layout that convolutions like")] = False
    compile: Annotated[bool, Field(description="torch.compile: slow start, faster steps")] = False
    start: Annotated[
        str | None, Field(description="a run whose averaged weights to begin with, where names and shapes are the same")
    ] = None
    freeze: Annotated[
        list[str], Field(description='parameters that stay as they are, by how their names begin, such as ["guide"]')
    ] = Field(default_factory=list)
    tensorboard: Annotated[bool, Field(description="also write RUN/tensorboard")] = False
    checkpoint_every: Annotated[Count, Field(description="steps between checkpoints")] = 1000
    sample_every: Annotated[int, Field(ge=0, description="steps between sample grids; 0: none")] = 1000

    @model_validator(mode="after")
    def _divides(self) -> Training:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} must divide batch_size = {self.batch_size}")
        return self


class Sampling(Section):
    """What `kuosan sample` does unless told otherwise."""

    solver: Annotated[dict[str, Any], Field(description="kind = auto | ddim | ..., and its own settings")] = Field(
        default_factory=lambda: {"kind": "auto"}
    )
    grid: Annotated[dict[str, Any] | None, Field(description="kind = karras | ..., of its times; none: its own")] = None
    steps: Annotated[Count, Field(description="steps from noise to data")] = 20
    temperature: Annotated[Positive, Field(description="of tokens and speech: under 1, what is likelier")] = 1.0
    vocoder: Annotated[str | None, Field(description="of text to speech: a vocoder's run; none: Griffin-Lim")] = None
    griffin_lim: Annotated[int, Field(ge=0, le=10_000, description="iterations that find the phases of speech")] = 32
    nucleus: Annotated[
        float, Field(gt=0, le=1, description="of tokens: only the likeliest, of this total probability")
    ] = 1.0
    guidance: Annotated[float, Field(ge=-1, description="classifier-free weight w; 0: none")] = 0.0
    interval: Annotated[
        tuple[float, float], Field(strict=False, description="noise levels sigma/alpha between which guidance acts")
    ] = (0.0, math.inf)
    rescale: Annotated[float, Field(ge=0, le=1, description="towards the unguided contrast; 0: not at all")] = 0.0
    clip: Annotated[
        bool,
        Field(description="keep every x0-hat within [-1, 1]; of words as points, the nearest word"),
    ] = True
    threshold: Annotated[float, Field(ge=0, lt=1, description="dynamic thresholding at this quantile; 0: none")] = 0.0
    corrector: Annotated[dict[str, Any] | None, Field(description="kind = langevin | mala, and its settings")] = None
    precision: Annotated[Literal["float32", "bfloat16"], Field(description="of the network's arithmetic")] = "float32"

    @model_validator(mode="after")
    def _one_transform(self) -> Sampling:
        if not self.interval[0] < self.interval[1]:
            raise ValueError(f"interval is a lower and a higher noise level, got {list(self.interval)}")
        if self.threshold and self.clip:
            raise ValueError("threshold takes the place of clip: set clip = false")
        return self


class Evaluation(Section):
    """How `kuosan evaluate` measures."""

    bound_steps: Annotated[Count, Field(description="K, the steps of the chain whose bound is reported")] = 1000
    variance: Annotated[
        Literal["beta_tilde", "beta", "learned", "posterior", "optimal", "optimal_per_dimension"],
        Field(description="of the reverse steps in the bound"),
    ] = "beta"
    terms: Annotated[
        Literal["all", "random", "stratified", "importance"], Field(description="how the sum over t is estimated")
    ] = "all"
    draws: Annotated[Count, Field(description="times that is repeated")] = 1
    examples: Annotated[Count, Field(description="most held-out examples that are scored")] = 1000
    samples: Annotated[Count, Field(description="samples that the judge sees")] = 1000


class Recipe(Section):
    """Everything that defines a training run; process, network and objective name a ``kind`` and its settings."""

    description: Annotated[str, Field(description="one line for `kuosan recipes`")] = ""
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of weights, order and noise")] = 0
    data: Data
    autoencoder: Annotated[dict[str, Any] | None, Field(description="a VAE: in the place of process and network")] = (
        None
    )
    embedding: Annotated[EmbeddingSection | None, Field(description="of texts: words as points, diffused")] = None
    encoder: Annotated[EncoderSection | None, Field(description="of text to speech: what reads the text")] = None
    reader: Annotated[ReaderSection | None, Field(description="of captions: what reads them")] = None
    process: Annotated[dict[str, Any] | None, Field(description="kind = cosine | ..., of a diffusion model")] = None
    network: Annotated[dict[str, Any] | None, Field(description="kind = mlp | ..., of a diffusion model")] = None
    denoiser: DenoiserSection = DenoiserSection()
    objective: dict[str, Any]
    training: Training
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.of_tokens:
            self._of_tokens_alone()
        if self.data.speech is not None:
            self._of_speech()
        elif self.sampling.vocoder is not None:
            raise ValueError("sampling.vocoder is of text to speech: drop it")
        elif self.encoder is not None:
            raise ValueError("a section [encoder] is of text to speech: drop it")
        elif self.sampling.griffin_lim != Sampling().griffin_lim:
            raise ValueError("sampling.griffin_lim is of speech: drop it")
        if self.embedding is not None:
            self._of_embeddings()
        elif self.denoiser.predicts == "words":
            raise ValueError('denoiser.predicts = "words" is of texts as points: add a section [embedding]')
        drawn = {"temperature": self.of_tokens or self.data.speech is not None, "nucleus": self.of_tokens}
        for name, fits in drawn.items():
            if not fits and getattr(self.sampling, name) != 1.0:
                raise ValueError(f"sampling.{name} is of tokens, and temperature of speech too: drop it")
        if self.autoencoder is None:
            missing = [name for name in ("process", "network") if getattr(self, name) is None]
            if missing:
                raise ValueError(f"{missing[0]} is missing: a diffusion model needs process and network")
        else:
            given = [name for name in ("process", "network") if getattr(self, name) is not None]
            if len(given) == 1:
                raise ValueError(f"{given[0]} alone is given; a diffusion prior over the latents needs both of them")
            if given and self.denoiser.predicts == "levels":
                raise ValueError('latents have no levels: the prior\'s denoiser.predicts must be another, such as "x0"')
            if self.family == "latent":
                self._of_codes(given)
            elif self.data.told:
                raise ValueError(
                    "an autoencoder is not told classes or captions: set data.conditional = false, drop data.captions"
                )
            else:
                own = {"solver", "steps"} if given else set()  # of a prior that is a diffusion model
                sampling, usual = self.sampling.model_dump(exclude=own), Sampling().model_dump(exclude=own)
                ignored = [name for name, value in sampling.items() if value != usual[name]]
                if ignored:
                    raise ValueError(f"an autoencoder is drawn from layer by layer: drop sampling.{ignored[0]}")
            if self.training.compile:
                raise ValueError("training.compile is for the network of a diffusion model: drop it")
        if self.evaluation.variance == "posterior" and self.denoiser.predicts != "levels":
            raise ValueError('evaluation.variance = "posterior" needs denoiser.predicts = "levels"')
        if self.evaluation.variance == "learned" and not self.denoiser.learned_variance:
            raise ValueError('evaluation.variance = "learned" needs denoiser.learned_variance = true')
        if self.denoiser.predicts == "energy" and self.training.compile:
            raise ValueError("torch.compile cannot differentiate twice, which an energy needs: drop training.compile")
        if self.sampling.guidance != 0:
            if not self.data.told:
                raise ValueError(
                    "sampling.guidance needs data.conditional = true, or captions: there is nothing to guide towards"
                )
            if self.data.captions is not None and self.training.label_drop == 0:
                raise ValueError("sampling.guidance leads away from the empty caption: set training.label_drop over 0")
        if self.reader is not None and (self.data.captions is None or self.data.captions.pretrained is not None):
            raise ValueError(
                "[reader] is of an encoder of captions that is trained: it needs data.captions without pretrained"
            )
        return self

    @property
    def family(self) -> str:
        """The kind of model: autoencoder, latent, diffusion, vocoder, tts, embedding, tokens, autoregressive."""
        if self.autoencoder is not None:
            return "latent" if self.objective.get("kind") == "latent" else "autoencoder"
        if self.data.speech is not None:
            return "tts" if self.data.speech.state == "mel" else "vocoder"
        if self.embedding is not None:
            return "embedding"
        kind = (self.process or {}).get("kind")
        if kind not in TOKEN_PROCESSES:
            return "diffusion"
        return "autoregressive" if kind == "autoregressive" else "tokens"

    @property
    def of_tokens(self) -> bool:
        """Whether the process is one of tokens."""
        return self.family in ("tokens", "autoregressive")

    def _of_codes(self, given: list[str]) -> None:
        if not given:
            raise ValueError("a latent diffusion model needs process and network, of its codes")
        if self.training.start is None:
            raise ValueError(
                "a latent diffusion model begins with a trained autoencoder: give training.start, the run of one"
            )
        if self.sampling.clip or self.sampling.threshold:
            raise ValueError("sampling.clip and threshold are of pixels, which lie in [-1, 1]: set clip = false")
        if self.denoiser.predicts == "energy" or self.denoiser.learned_variance:
            raise ValueError("of codes denoiser.predicts is x0, eps, v, velocity or flow, without a learned variance")

    def _of_speech(self) -> None:
        if self.autoencoder is not None or self.embedding is not None or self.of_tokens:
            raise ValueError("speech takes a diffusion model of its own kind: process and network, no other section")
        if self.sampling.clip or self.sampling.threshold:
            raise ValueError("sampling.clip and threshold are of pixels, which lie in [-1, 1]: set clip = false")
        if (self.encoder is not None) != (self.family == "tts"):
            raise ValueError(
                'a section [encoder] and data.speech.state = "mel" are both of text to speech: give both, or neither'
            )
        if self.family == "vocoder" and self.sampling.vocoder is not None:
            raise ValueError("sampling.vocoder is of text to speech: drop it")
        assert self.data.speech is not None
        if self.data.speech.state in ("spectrum", "wave") and self.sampling.griffin_lim != Sampling().griffin_lim:
            raise ValueError(f"sampling.griffin_lim finds phases, which a {self.data.speech.state} has: drop it")
        if self.denoiser.learned_variance:
            raise ValueError("denoiser.learned_variance is not of speech: drop it")
        if self.denoiser.predicts in ("levels", "energy"):
            raise ValueError(f'denoiser.predicts = "{self.denoiser.predicts}" is not of speech: take x0, eps or v')

    def _of_embeddings(self) -> None:
        if self.autoencoder is not None or (self.process or {}).get("kind") in TOKEN_PROCESSES:
            raise ValueError("words as points take a process such as sqrt: drop autoencoder, and processes of tokens")
        if self.denoiser.predicts not in ("x0", "words") or self.denoiser.learned_variance:
            raise ValueError('of words as points denoiser.predicts is "x0" or "words", without a learned variance')
        if self.sampling.threshold:
            raise ValueError("sampling.threshold is of images: drop it")

    def _of_tokens_alone(self) -> None:
        for name, usual, section, known in (
            ("sampling", Sampling(), self.sampling, {"solver", "steps", "guidance", "temperature", "nucleus"}),
            ("denoiser", DenoiserSection(), self.denoiser, set()),
            ("evaluation", Evaluation(), self.evaluation, {"draws", "examples", "samples"}),
        ):
            ignored = [key for key in type(usual).model_fields if getattr(section, key) != getattr(usual, key)]
            if ignored := [key for key in ignored if key not in known]:
                raise ValueError(f"{name}.{ignored[0]} is not of tokens: drop it")
        if self.training.compile:
            raise ValueError("training.compile is for the network of a continuous model: drop it")

    def fingerprint(self) -> str:
        """A hash of what training depends on; sampling and evaluation may change without harm."""
        parts = self.model_dump(exclude={"description", "sampling", "evaluation"}, exclude_defaults=True)
        for harmless in ("checkpoint_every", "sample_every", "tensorboard"):
            parts["training"].pop(harmless, None)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("kuosan") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file: {error}") from None


def _override(table: dict[str, Any], override: str) -> None:
    """Apply "training.steps=500" to a nested table; the value is read as TOML, or else as a word."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"an override looks like training.steps=500, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{override!r}: {section} is a value, not a section")
    if last == "kind" and table.get("kind") != value:
        table.clear()  # another kind has other settings
    if sections == ["data"] and last in SOURCES:
        for other in SOURCES:
            table.pop(other, None)  # data have one source
    table[last] = value


def as_table(words: Sequence[str]) -> dict[str, Any]:
    """A kind and its settings from words such as ["ddim", "eta=0.5"]."""
    if not words:
        raise RecipeError("a kind is expected, such as ddim, with its settings; got nothing")
    table: dict[str, Any] = {"kind": words[0]}
    for word in words[1:]:
        _override(table, word)
    return table


def describe() -> str:
    """Every setting of a recipe with its type, default and meaning, for --help."""
    lines = []
    for name, section in Recipe.model_fields.items():
        annotation = next(
            (one for one in get_args(section.annotation) if hasattr(one, "model_fields")), section.annotation
        )
        fields = getattr(annotation, "model_fields", None)
        if fields is None:
            fields, name = {name: section}, ""
        for key, field in fields.items():
            default = "" if field.is_required() or field.default_factory else f" [{field.default}]"
            label = f"{name}.{key}" if name else key
            lines.append(f"  {label:28} {field.description or ''}{default}")
    return "\n".join(lines)


def explain(error: ValidationError, where: str) -> str:
    """A pydantic error as one line for each mistake: place, key, what was expected, what came."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: {key}: there is no such key")
        elif item["type"] == "missing":
            lines.append(f"{where}: {key}: is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            came = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
            lines.append(f"{where}: {key}: {message}{came}")
    return "\n".join(lines)


def read(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a shipped name or a TOML file, with overrides such as "training.steps=500".

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key, a wrong type or an impossible value.
    """
    path = Path(source)
    if path.suffix != ".toml":
        known = shipped()
        if str(source) not in known:
            raise RecipeError(f"there is no recipe {str(source)!r}; there are {', '.join(known)}, or give a path.toml")
        path = known[str(source)]
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such file")
    table = _parse(path)
    for override in sorted(overrides, key=lambda one: ".kind=" not in one):  # kinds first: they clear their table
        _override(table, override)
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(explain(error, path.name)) from None

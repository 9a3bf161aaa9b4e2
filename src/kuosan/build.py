"""From a recipe's tables to objects: each ``kind`` names a class, whose own signature says which keys there are."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from kuosan import autoencoders, networks, objectives, schedules, solvers
from kuosan.autoencoders import ImageAutoencoder
from kuosan.autoencoders.objective import Elbo, Latent
from kuosan.bridge.autoencoders import DiffusersAutoencoder
from kuosan.bridge.networks import network as diffusers_network
from kuosan.bridge.solver import DiffusersSolver
from kuosan.bridge.solver import schedule as diffusers_schedule
from kuosan.chain import Chain
from kuosan.denoiser import EDM, Denoiser
from kuosan.diffusion import DiffusionChain
from kuosan.discrete import RULES, CategoricalChain, CategoricalDenoiser, CategoricalProcess, TokenRule
from kuosan.discrete.autoregressive import Autoregressive, AutoregressiveChain
from kuosan.discrete.embedding import EmbeddingDenoiser, WordEmbedding
from kuosan.discrete.lengths import PAD, Lengths
from kuosan.discrete.objective import DiffusionLM, TokenBound, WordCrossEntropy
from kuosan.learned import Continuous, LearnedSchedule
from kuosan.networks import Energy
from kuosan.networks.captions import Pretrained, Reader
from kuosan.networks.frames import Frames
from kuosan.networks.sequence import SequenceTransformer
from kuosan.networks.tokens import TokenTransformer
from kuosan.networks.wave import WaveGrad, WaveNet
from kuosan.objectives import Objective
from kuosan.process import Grid, Process
from kuosan.recipe import ReaderSection, Recipe, RecipeError, explain
from kuosan.solvers import CORRECTORS, GRIDS, Corrector, Solver, Spacing
from kuosan.speech.acoustic import Acoustic, Encoder, TextToSpeech

SCHEDULES: dict[str, Callable] = {
    "linear": schedules.LinearBeta,
    "cosine": schedules.Cosine,
    "sqrt": schedules.Sqrt,
    "ve": schedules.VE,
    "sub_vp": schedules.SubVP,
    "flow": schedules.RectifiedFlow,
    "ddpm": schedules.linear_beta_table,
    "learned": LearnedSchedule,
    "diffusers": diffusers_schedule,
}
#: Of diffusion models that are not of speech or texts; and their solvers.
NETWORKS: dict[str, Callable] = {**networks.NETWORKS, "diffusers": diffusers_network}
SOLVERS: dict[str, Callable] = {**solvers.SOLVERS, "diffusers": DiffusersSolver}
AUTOENCODERS: dict[str, Callable] = {**autoencoders.AUTOENCODERS, "diffusers": DiffusersAutoencoder}
OBJECTIVES: dict[str, Callable] = {
    "simple": objectives.Simple,
    "weighted": objectives.Weighted,
    "cross_entropy": objectives.CrossEntropy,
    "bound": objectives.Bound,
    "hybrid": objectives.Hybrid,
    "continuous": Continuous,
    "elbo": Elbo,
    "latent": Latent,
    "token_bound": TokenBound,
    "diffusion_lm": DiffusionLM,
    "word_cross_entropy": WordCrossEntropy,
    "text_to_speech": TextToSpeech,
}
WEIGHTINGS: dict[str, Callable] = {
    "plain": objectives.Plain,
    "snr": objectives.SNR,
    "min_snr": objectives.MinSNR,
    "edm": objectives.EDMWeight,
    "sigmoid": objectives.Sigmoid,
    "likelihood": objectives.Likelihood,
}
TIMES: dict[str, Callable] = {
    "uniform": objectives.Uniform,
    "stratified": objectives.Stratified,
    "logit_normal": objectives.LogitNormal,
    "log_normal_noise": objectives.LogNormalNoise,
    "loss_aware": objectives.LossAware,
}
#: Of tokens. In an autoregressive model they are taken away one by one from the end, which needs no process.
TOKEN_PROCESSES: dict[str, Callable] = {
    "masked": CategoricalProcess.masked,
    "uniform": CategoricalProcess.uniform,
    "autoregressive": lambda: None,
}
TOKEN_NETWORKS: dict[str, Callable] = {"tokens": TokenTransformer}
#: Of words as points.
SEQUENCE_NETWORKS: dict[str, Callable] = {"sequence": SequenceTransformer}
#: Of speech, told a mel: of its frames, or of the wave itself.
SPEECH_NETWORKS: dict[str, Callable] = {"frames": Frames, "wavenet": WaveNet, "wavegrad": WaveGrad}
#: Of a token rule; of a continuous model there are the solvers.
TOKEN_RULES: dict[str, Callable] = {"auto": RULES["ancestral"], **RULES}
#: Parameters that are themselves a table with a kind.
NESTED: dict[str, Mapping[str, Callable]] = {"weighting": WEIGHTINGS, "times": TIMES}
#: Strata of the continuous bound of a prior over latents: the bound itself does not depend on them.
LATENT_STEPS = 100
#: What a network learns from the data instead of the recipe.
FROM_DATA = (
    "shape",
    "classes",
    "outputs",
    "stack_last",
    "levels",
    "prior",
    "states",
    "vocabulary",
    "still",
    "length",
    "causal",
    "padding",
    "given",
    "hop",
    "reader",
)
#: The earliest noisy time of the continuous bound of tokens: before it one of a thousand is noise.
EARLIEST = 1e-3
#: The recipe's open sections and what their kinds are.
SECTIONS: dict[str, Mapping[str, Callable]] = {
    "autoencoder": AUTOENCODERS,
    "process": SCHEDULES,
    "process, of tokens": TOKEN_PROCESSES,
    "network": NETWORKS,
    "network, of tokens": TOKEN_NETWORKS,
    "network, of words as points": SEQUENCE_NETWORKS,
    "network, of speech": SPEECH_NETWORKS,
    "objective": OBJECTIVES,
    "sampling.solver": SOLVERS,
    "sampling.solver, of tokens": TOKEN_RULES,
    "sampling.grid": GRIDS,
    "sampling.corrector": CORRECTORS,
}


def settings(maker: Callable, given: tuple[str, ...] = ()) -> dict[str, inspect.Parameter]:
    """The parameters of a maker that a recipe may set, with resolved types; ``given`` ones come from elsewhere."""
    hints = get_type_hints(maker.__init__ if inspect.isclass(maker) else maker)
    return {
        name: parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(maker).parameters.items()
        if name not in given
    }


def _scalar(annotation: Any) -> Any:
    """The part of a type that a TOML file can hold: str of str | OptimalVariance; None if there is no such part."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if _scalar(part) is not None]
        return Union[tuple(parts)] if parts != [types.NoneType] and parts else None  # noqa: UP007
    return annotation if annotation in (int, float, str, bool, types.NoneType) else None


def make(kinds: Mapping[str, Callable], table: Mapping[str, Any], where: str, **given: Any) -> Any:
    """The object that a table describes.

    Args:
        kinds: name -> class or function.
        table: its ``kind`` and settings.
        where: the table's place, for messages.
        given: arguments that do not come from the recipe.

    Raises:
        RecipeError: no kind or an unknown one, an unknown key, a wrong type, a value that the class refuses.
    """
    if isinstance(table, str):  # a kind without settings
        table = {"kind": table}
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where}: must be a table with a kind, got {table!r}")
    table = dict(table)
    kind = table.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise RecipeError(f"{where}.kind: must be one of {', '.join(kinds)}, got {kind!r}")
    maker = kinds[kind]
    known = settings(maker, tuple(given))
    fields: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for name, parameter in known.items():
        if name in NESTED:
            if name in table:
                nested[name] = make(NESTED[name], table.pop(name), f"{where}.{name}")
            elif parameter.default is inspect.Parameter.empty:
                raise RecipeError(f"{where}.{name}: is missing")
        elif _scalar(parameter.annotation) is not None:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (_scalar(parameter.annotation), default)
    model = create_model(kind, __config__=ConfigDict(extra="forbid", strict=True, protected_namespaces=()), **fields)
    try:
        values = model.model_validate(table).model_dump()
    except ValidationError as error:
        raise RecipeError(explain(error, where)) from None
    accepted = {k: v for k, v in given.items() if k in inspect.signature(maker).parameters}
    try:
        return maker(**values, **nested, **accepted)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None


def describe_kinds() -> str:
    """Every kind of every open section with its own settings and defaults, for --help."""
    lines = []
    for where, kinds in {**SECTIONS, **{f"objective.{name}": kinds for name, kinds in NESTED.items()}}.items():
        name, comma, of = where.partition(",")
        lines.append(f"{name}.kind{comma}{of}, and the settings of each:")
        for kind, maker in kinds.items():
            known = [
                f"{name}={{kind=...}}"
                if name in NESTED
                else f"{name}={'...' if parameter.default is inspect.Parameter.empty else parameter.default}"
                for name, parameter in settings(maker, FROM_DATA).items()
                if name in NESTED or _scalar(parameter.annotation) is not None
            ]
            lines.append(f"  {kind:18} {', '.join(known)}")
    return "\n".join(lines)


def make_process(recipe: Recipe) -> Process:
    return Process(make(SCHEDULES, recipe.process or {}, "process"))


def make_model(recipe: Recipe, shape: tuple[int, ...], levels: int, classes: int) -> Denoiser | Chain:
    """The untrained model of a recipe for examples of a shape, with so many levels and classes (0: none).

    Raises:
        RecipeError: settings that do not go together.
    """
    if recipe.of_tokens:
        return make_token_chain(recipe, shape, levels, classes)
    if recipe.embedding is not None:
        return make_embedding_denoiser(recipe, shape, levels, classes)
    if recipe.encoder is not None:
        return make_acoustic(recipe, shape)
    if len(shape) == 1:
        raise RecipeError(
            "process.kind: of texts is masked, uniform or autoregressive, or any other one with a section [embedding]"
        )
    if recipe.autoencoder is None:
        return make_denoiser(recipe, shape, levels or None, classes)
    kind = AUTOENCODERS.get(recipe.autoencoder.get("kind", ""))
    if recipe.family == "latent" and not (inspect.isclass(kind) and issubclass(kind, ImageAutoencoder)):
        raise RecipeError("autoencoder.kind: a latent diffusion model has codes that are images: take convolutional")
    given: dict[str, Any] = {"shape": shape, "levels": levels}
    if recipe.process is not None:
        given["prior"] = lambda latent: DiffusionChain(
            make_denoiser(recipe, latent, None, classes), steps=LATENT_STEPS, variance="beta", form="continuous"
        )
    return make(AUTOENCODERS, recipe.autoencoder, "autoencoder", **given)


def make_objective(recipe: Recipe) -> Objective:
    """Raises RecipeError if it is not one of this kind of model."""
    found = make(OBJECTIVES, recipe.objective, "objective")
    own = {
        "elbo": recipe.autoencoder is not None,
        "latent": recipe.autoencoder is not None,
        "token_bound": recipe.of_tokens,
        "diffusion_lm": recipe.embedding is not None,
        "word_cross_entropy": recipe.embedding is not None,
        "text_to_speech": recipe.encoder is not None,
    }
    fitting = [kind for kind, fits in own.items() if fits] or [kind for kind in OBJECTIVES if kind not in own]
    if recipe.objective["kind"] not in fitting:
        raise RecipeError(
            f"objective.kind: of this kind of model must be {', '.join(fitting)}, got {recipe.objective['kind']!r}"
        )
    if isinstance(found, WordCrossEntropy) and recipe.denoiser.predicts != "words":
        raise RecipeError('objective.kind: word_cross_entropy needs denoiser.predicts = "words"')
    if isinstance(found, TextToSpeech) and recipe.data.speech and found.frames != recipe.data.speech.frames:
        raise RecipeError(
            f"objective.frames: must be that of data.speech, {recipe.data.speech.frames}, got {found.frames}"
        )
    learned = recipe.process is not None and recipe.process.get("kind") == "learned"
    if learned and not isinstance(found, Continuous | Elbo):
        raise RecipeError(
            "objective.kind: a learned schedule needs continuous, the bound; under another objective its ends would "
            "move to wherever that is easy"
        )
    return found


def make_rule(table: Mapping[str, Any]) -> TokenRule:
    return make(TOKEN_RULES, table, "sampling.solver")


def make_solver(table: Mapping[str, Any]) -> Solver:
    return make(SOLVERS, table, "sampling.solver")


def make_grid(table: Mapping[str, Any]) -> Spacing:
    return make(GRIDS, table, "sampling.grid")


def make_corrector(table: Mapping[str, Any]) -> Corrector:
    return make(CORRECTORS, table, "sampling.corrector")


def make_denoiser(recipe: Recipe, shape: tuple[int, ...], levels: int | None, classes: int) -> Denoiser:
    """The untrained denoiser of a recipe for examples of a shape, with so many levels and classes (0: none).

    Raises:
        RecipeError: settings that do not go together.
    """
    section, speech = recipe.denoiser, recipe.data.speech
    process = make_process(recipe)
    by_level = section.predicts == "levels"
    told: dict[str, Any] = {} if speech is None else {"given": speech.mels, "hop": speech.hop}
    if recipe.data.captions is not None and "text_encoder" not in (recipe.network or {}):  # which reads by itself
        told = {"reader": make_reader(recipe)}
        _takes(NETWORKS, recipe.network or {}, "reader", "captions: take transformer")
    network = make(
        NETWORKS if speech is None else SPEECH_NETWORKS,
        recipe.network or {},
        "network",
        **told,
        shape=shape,
        classes=classes if recipe.data.conditional else 0,
        outputs=(levels or 1) if by_level else 1 + section.learned_variance,
        stack_last=by_level,
    )
    if section.predicts == "energy":
        network = Energy(network)
    try:
        edm = EDM(section.sigma_data) if section.preconditioning == "edm" else None
        return Denoiser(network, process, section.predicts, edm, levels, section.learned_variance)
    except ValueError as error:
        raise RecipeError(f"denoiser: {error}") from None


def make_reader(recipe: Recipe) -> Reader | Pretrained:
    """What reads captions, untrained or from files."""
    how, section = recipe.data.captions, recipe.reader or ReaderSection()
    assert how is not None
    if how.pretrained is not None:
        return Pretrained(how.pretrained, how.length)
    try:
        return Reader(how.vocabulary, how.length, section.width, section.depth, section.heads, section.dropout)
    except ValueError as error:
        raise RecipeError(f"reader: {error}") from None


def _takes(kinds: Mapping[str, Callable], table: Mapping[str, Any], name: str, why: str) -> None:
    """Raises RecipeError where the maker of a kind has no such parameter."""
    maker = kinds.get(table.get("kind", ""))
    if maker is not None and name not in inspect.signature(maker).parameters:
        raise RecipeError(f"network.kind: {table['kind']} cannot be told {why}")


def make_acoustic(recipe: Recipe, shape: tuple[int, ...]) -> Acoustic:
    """The untrained model of text to speech, for mels of a shape.

    Raises:
        RecipeError: settings that do not go together.
    """
    assert recipe.encoder is not None
    plain, section = make_denoiser(recipe, shape, None, 0), recipe.encoder
    try:
        encoder = Encoder(shape[0], section.width, section.depth, section.kernel, section.dropout)
    except ValueError as error:
        raise RecipeError(f"encoder: {error}") from None
    return Acoustic(plain.network, plain.process, plain.predicts, plain.preconditioning, encoder)


def make_token_chain(
    recipe: Recipe, shape: tuple[int, ...], vocabulary: int, classes: int
) -> CategoricalChain | AutoregressiveChain:
    """The untrained model of a recipe for texts of at most so many tokens, padded, of a vocabulary.

    Raises:
        RecipeError: settings that do not go together, or data that are not texts.
    """
    if len(shape) != 1:
        raise RecipeError("process.kind: masked, uniform and autoregressive are of texts, and this data is of images")
    (length,), process = shape, dict(recipe.process or {})
    autoregressive = process["kind"] == "autoregressive"
    told = classes if recipe.data.conditional else 0
    network = make(
        TOKEN_NETWORKS,
        recipe.network or {},
        "network",
        states=vocabulary + 1,
        vocabulary=vocabulary,
        length=length,
        classes=told,
        causal=autoregressive,
        padding=None if autoregressive else PAD,
    )
    if autoregressive:
        make(TOKEN_PROCESSES, process, "process")  # says which settings it does not have
        return AutoregressiveChain(Autoregressive(network, vocabulary, PAD), length)
    tokens = make(TOKEN_PROCESSES, process, "process", vocabulary=vocabulary, still=PAD)
    denoiser = CategoricalDenoiser(network, tokens, lengths=Lengths(length, told))
    return CategoricalChain(denoiser, grid=Grid((1.0, EARLIEST)), form="continuous")


def make_embedding_denoiser(recipe: Recipe, shape: tuple[int, ...], vocabulary: int, classes: int) -> EmbeddingDenoiser:
    """The untrained denoiser of texts as points, of at most so many tokens of a vocabulary.

    Raises:
        RecipeError: settings that do not go together, or data that are not texts.
    """
    section = recipe.denoiser
    if recipe.embedding is None or len(shape) != 1:
        raise RecipeError("embedding: is of texts, and this data is of images")
    size = recipe.embedding.size
    network = make(
        SEQUENCE_NETWORKS,
        recipe.network or {},
        "network",
        shape=(*shape, size),
        classes=classes if recipe.data.conditional else 0,
        outputs=vocabulary if section.predicts == "words" else size,
        padding=True,
    )
    process, embedding = make_process(recipe), WordEmbedding(vocabulary, size, padding=True)
    lengths = Lengths(*shape, classes if recipe.data.conditional else 0)
    try:
        edm = EDM(section.sigma_data) if section.preconditioning == "edm" else None
        return EmbeddingDenoiser(network, process, embedding, section.predicts, edm, lengths)
    except ValueError as error:
        raise RecipeError(f"denoiser: {error}") from None

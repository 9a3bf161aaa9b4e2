"""The run of a diffusion model of words as points: a diffusion run whose data are texts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kuosan.bound import Likelihood
from kuosan.chain import Chain
from kuosan.denoiser import Denoiser
from kuosan.discrete.control import ClassifierLoss, GradientControl, NoisyClassifier
from kuosan.discrete.embedding import Clamp, EmbeddingChain, EmbeddingDenoiser, WordEmbedding, sample_words
from kuosan.discrete.lengths import PAD
from kuosan.fetch import to_stderr
from kuosan.medium import TrainingExamples
from kuosan.optimal import weights_fingerprint
from kuosan.process import Grid
from kuosan.recipe import Training
from kuosan.runs.diffusion import DiffusionRun, unmeasured_solver
from kuosan.runs.run import RunError, device, write
from kuosan.sampler import Sampler, Settings
from kuosan.seeds import stream
from kuosan.solvers import Auto, Inpainting, Model, Tuned
from kuosan.text.medium import TextMedium
from kuosan.training.checkpoint import CheckpointStore
from kuosan.training.ema import load_parameters
from kuosan.training.loop import Trainer
from kuosan.variance import Choice

#: Of training a classifier of noisy words, where nobody says otherwise.
CLASSIFIER_STEPS = 600


@dataclass(frozen=True)
class WordSampler(Sampler):
    """A sampler of texts, of which some tokens and the length may be given.

    Args:
        known: (L,) int64, tokens that are given, -1 where one is drawn.
        length: of each text, in tokens; None: where the first padding is drawn.
        controlled: towards classes, by a classifier.
    """

    known: Tensor | None = None
    length: int | None = None
    controlled: bool = False


@dataclass(frozen=True)
class WordSettings(Settings):
    """The settings of sampling of words: to clip is to replace every x0-hat by the nearest point.

    Args:
        embedding: the points.
        classifier: that the model without classes is controlled by; None: it is not.
        control: the weight of its gradient.
        control_steps: gradients at each time.
    """

    embedding: WordEmbedding | None = None
    classifier: NoisyClassifier | None = None
    control: float = 0.0
    control_steps: int = 1

    def model(self, denoiser: Denoiser, conditional: bool) -> Model:
        if self.classifier is None:
            return super().model(denoiser, conditional)
        free = dataclasses.replace(self, classifier=None, known=None, mask=None).model(denoiser, conditional)
        model: Model = GradientControl(
            free, self.classifier.log_prob, self.control, self.section.interval, steps=self.control_steps
        )
        if self.known is not None and self.mask is not None:
            model = Inpainting(model, self.known, self.mask, self.corrections)
        return model

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        assert self.embedding is not None
        return Clamp(self.embedding) if self.section.clip else None

    @property
    def words(self) -> dict[str, Any]:
        if self.classifier is None:
            return super().words
        steps = {"control_steps": self.control_steps} if self.control_steps > 1 else {}
        return super().words | {"control": self.control} | steps


class EmbeddingRun(DiffusionRun):
    """A trained (or half-trained) diffusion model of texts as points (Diffusion-LM)."""

    families = ("embedding",)
    has_ode = False
    medium: TextMedium

    @property
    def denoiser(self) -> EmbeddingDenoiser:
        """The model with its averaged weights, ready to use."""
        return self.model

    @property
    def state_shape(self) -> tuple[int, ...]:
        assert self.recipe.embedding is not None
        return (*self.shape, self.recipe.embedding.size)

    def states(self, part: Any) -> Tensor:
        return self.denoiser.embedding(part.tokens)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sampler(
        self, *, prompt: str | None = None, infill: str | None = None, length: int | None = None, **settings: Any
    ) -> WordSampler:
        """The model, table and all else that sampling takes; what is not given is the recipe's.

        Args:
            prompt, infill, length: of :meth:`kuosan.text.medium.TextMedium.given`. The vectors of given words, and of
                the padding after the asked length, are held at every noise level, as parts of a picture are.
            settings: of :meth:`kuosan.runs.DiffusionRun.sampler`; clip replaces every x0-hat by the nearest word.
                Beside them: control, the weight of the gradient of :meth:`noisy_classifier`, which leads the model
                *without* classes to those that are asked for (1: Bayes' rule); control_steps, gradients at each time:
                :class:`kuosan.discrete.control.GradientControl`.

        Raises:
            ValueError: an unknown setting or an impossible value.
        """
        known, length = self.medium.given(prompt, infill, length)
        asked = {key: v for key, v in (("prompt", prompt), ("infill", infill), ("length", length)) if v is not None}
        if settings.get("known") is not None or settings.get("mask") is not None:
            raise RunError(f"{self.folder} is of words: give a prompt, or a text to fill in, in the place of a picture")
        held = torch.full(self.shape, -1) if known is None else known.clone()
        if length is not None:
            held[length:] = PAD
        if bool((held >= 0).any()):
            with torch.no_grad():
                settings["known"] = self.denoiser.embedding(held.clamp_min(0)[None].to(device()))[0].cpu()
            settings["mask"] = (held >= 0)[:, None].expand(self.state_shape)
        found = super().sampler(**settings)
        for name in ("known", "mask"):
            found.how.pop(name, None)
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        controlled = settings.get("control") is not None
        return WordSampler(**parts | {"how": found.how | asked}, known=known, length=length, controlled=controlled)

    def _settings(self, given: Mapping[str, Any]) -> WordSettings:
        given = dict(given)
        if given.get("threshold"):
            raise RunError(f"{self.folder} is of words: it has no threshold to choose")
        control, steps = given.pop("control", None), given.pop("control_steps", None)
        if control is None and steps is not None:
            raise RunError("control_steps are of control: give its weight too")
        if control is not None:
            if given.get("guidance") or given.get("weak"):
                raise RunError("control is of the model without classes: drop guidance, or control")
            given["guidance"] = 0.0
        found = super()._settings(given)
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        embedding = self.denoiser.embedding
        if control is None:
            return WordSettings(**parts, embedding=embedding)
        if parts["solver"] is None:
            raise RunError("tables are tuned without control: choose another solver")
        if isinstance(parts["solver"], Auto):
            parts["solver"] = Auto(tuned=False)
        if self.conditional and self.recipe.training.label_drop == 0:
            raise RunError(f"{self.folder} never trained without a class, and control is of the model without classes")
        own: dict[str, Any] = {"classifier": self.noisy_classifier(), "control": control}
        return WordSettings(**parts, embedding=embedding, **own, control_steps=1 if steps is None else steps)

    def tune(self, steps: int, *, settings: Mapping[str, Any] | None = None, **how: Any) -> tuple[Tuned, Path]:
        if (settings or {}).get("control") is not None:
            raise RunError("tables are tuned without control: drop it")
        return super().tune(steps, settings=settings, **how)

    def batches(
        self, sampler: Sampler, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int = 256
    ) -> Iterator[Tensor]:
        if labels is None and isinstance(sampler, WordSampler) and sampler.controlled:
            assert self.classes is not None
            labels = torch.arange(len(seeds)) % len(self.classes)  # of a model that is told none, too
        return super().batches(sampler, seeds, labels, batch_size)

    def kept(self, x: Tensor, sampler: Sampler) -> Tensor:
        """The nearest words; of an asked length none of them padding, and nothing after the first padding."""
        assert isinstance(sampler, WordSampler)
        x, embedding = x.to(device()), self.denoiser.embedding
        words = embedding.nearest(x).cpu()
        if sampler.length is not None:
            padded = words == PAD
            padded[:, sampler.length :] = False
            if bool(padded.any()):
                products = embedding.products(x[padded.to(x.device)]).detach()
                products[:, PAD] = -torch.inf
                words[padded] = products.argmax(-1).cpu()
        if sampler.known is not None:
            words = torch.where(sampler.known >= 0, sampler.known, words)
        return _ended(words)

    def draw_while_training(self, model: EmbeddingDenoiser, seeds: Sequence[int]) -> Tensor:  # type: ignore[override]
        drawn = sample_words(
            model,
            model.embedding,
            self.shape[0],
            clamp=self.recipe.sampling.clip,
            seeds=seeds,
            table=unmeasured_solver(self.recipe).table(model.process, steps=min(20, self.recipe.sampling.steps)),
            condition=self.labels_for(len(seeds)),
            device=device(),
        )
        return _ended(drawn.tokens)

    # -- control ------------------------------------------------------------------------------------------------------

    _classifier: NoisyClassifier | None = None

    def noisy_classifier(self, steps: int | None = None, batch_size: int = 128) -> NoisyClassifier:
        """A classifier of texts whose words are noised points of this model: what control takes the gradient of.

        Trained once, on the training texts, and kept in RUN/classifier; trained again if the weights of the model are
        others, or with another number of steps.

        Args:
            steps: of training; default what is kept, or 600.
            batch_size: texts of each step.

        Raises:
            RunError: the texts have no classes.
        """
        if not self.classes:
            raise RunError(f"the texts of {self.folder} have no classes: there is nothing to control them towards")
        folder, weights = self.folder / "classifier", weights_fingerprint(self.denoiser)
        kept = _read(folder / "classifier.json")
        if kept.get("weights") != weights or steps not in (None, kept.get("steps")):
            if folder.is_dir():
                to_stderr(f"{folder} is of other weights, or of a training of other length; training again")
                shutil.rmtree(folder)
            kept = {"weights": weights, "steps": steps or CLASSIFIER_STEPS, "batch_size": batch_size}
            folder.mkdir()
            write(folder / "classifier.json", json.dumps(kept, indent=2))
            self._classifier = None
        if self._classifier is not None:
            return self._classifier
        denoiser, store = self.denoiser, CheckpointStore(folder / "checkpoints", weights)
        torch.manual_seed(stream("classifier", self.recipe.seed).initial_seed())
        model = NoisyClassifier(denoiser.embedding, denoiser.process, self.shape[0], len(self.classes))
        if kept["steps"] not in store.steps():
            to_stderr("training the classifier of noisy words ...")
            settings = Training(
                steps=kept["steps"],
                batch_size=kept["batch_size"],
                warmup=kept["steps"] // 10,
                weight_decay=0.01,
                ema=0.99,
                label_drop=0.0,
                sample_every=0,
            )
            Trainer(
                model=model,
                objective=ClassifierLoss(),
                source=TrainingExamples(self.medium, conditional=True),
                settings=settings,
                seed=self.recipe.seed,
                store=store,
                log=folder / "metrics.jsonl",
                device=device(),
            ).train()
        checkpoint = store.load(groups=("weights", "ema"))
        assert checkpoint is not None
        model.load_state_dict(checkpoint.tensors["weights"])
        load_parameters(model, checkpoint.tensors["ema"])
        model.eval().to(device())
        for p in model.parameters():
            p.requires_grad_(False)
        self._classifier = model
        return model

    # -- measuring ----------------------------------------------------------------------------------------------------

    def examples(self, split: str = "held_out", most: int | None = None) -> tuple[Tensor, Tensor | None]:
        x, condition = super().examples(split, most)
        return pad(x, (0, self.shape[0] - x.shape[1]), value=PAD), condition

    def chain(  # type: ignore[override]
        self,
        *,
        variance: Choice | None = None,
        steps: int | None = None,
        grid: Grid | None = None,
        **settings: Any,
    ) -> tuple[Chain, dict[str, Any]]:
        """The ladder over words: in continuous time, or of K steps.

        Args:
            variance: of the reverse steps; default the recipe's.
            steps: K; or ``grid``. Default: continuous time.
        """
        refused = [name for name, value in settings.items() if value]
        if refused:
            raise RunError(f"{self.folder} is of words: its chain has no {', '.join(refused)} to choose")
        choice = self.recipe.evaluation.variance if variance is None else variance
        continuous = steps is None and grid is None
        count = self.recipe.evaluation.bound_steps if continuous else steps
        how: dict[str, Any] = {"steps": count} if grid is None else {"grid": grid}
        form = "continuous" if continuous else "matching"
        chain = EmbeddingChain(self.denoiser, variance=self.variance(choice), form=form, **how)
        said = {"form": "continuous time"} if continuous else {"steps": chain.length, "form": f"{chain.length} steps"}
        return chain, said

    def elbo_settings(self, chain: Chain) -> dict[str, Any]:
        section = self.recipe.evaluation
        assert isinstance(chain, EmbeddingChain)
        return {"estimator": chain.form, "terms": section.terms, "draws": section.draws, "batch_size": 256}

    def by_ode(self, x: Tensor, condition: Tensor | None, draws: int = 2, **settings: Any) -> Likelihood:
        raise RunError(f"{self.folder} is of words: the density that the ODE gives of their points is no probability")


def _ended(words: Tensor) -> Tensor:
    """Texts with nothing after the first padding."""
    return words.masked_fill((words == PAD).cumsum(1) > 0, PAD)


def _read(path: Path) -> dict[str, Any]:
    """What a small file of JSON says; nothing, if it is not there or damaged."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}

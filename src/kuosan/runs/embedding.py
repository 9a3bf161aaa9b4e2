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

from kuosan.bound import Likelihood
from kuosan.chain import Chain
from kuosan.denoiser import Denoiser
from kuosan.discrete.control import ClassifierLoss, GradientControl, NoisyClassifier
from kuosan.discrete.embedding import Clamp, EmbeddingDenoiser, WordEmbedding, sample_words
from kuosan.discrete.embedding_chain import EmbeddingChain
from kuosan.discrete.lengths import PAD, Lengths
from kuosan.discrete.risk import candidate_batches, of_least_risk, with_candidates
from kuosan.discrete.sampling import least
from kuosan.fetch import to_stderr
from kuosan.medium import TrainingExamples
from kuosan.optimal import weights_fingerprint
from kuosan.process import Grid
from kuosan.recipe import Training
from kuosan.runs.diffusion import OF_IMAGES, DiffusionRun, unmeasured_solver
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
CLASSIFIER_STEPS = 3000


@dataclass(frozen=True)
class WordSampler(Sampler):
    """A sampler of texts, of which some tokens and the length may be given.

    Args:
        denoiser: whose points words are rounded to, and whose law lengths are drawn from.
        known: (L,) int64, tokens that are given, -1 where one is drawn.
        points: (L, D), those of the given tokens, which are held.
        corrections: of :class:`~kuosan.solvers.Inpainting`.
        length: of each text, in tokens; None: drawn from the model's law of lengths.
        control: towards classes, by a classifier, of this weight; None: not at all.
        candidates: how many texts are drawn for each, of which the one of least risk is taken.
    """

    denoiser: EmbeddingDenoiser
    known: Tensor | None = None
    points: Tensor | None = None
    corrections: int = 0
    length: int | None = None
    control: float | None = None
    candidates: int = 1

    @property
    def law(self) -> Lengths:
        """Of the lengths."""
        assert self.denoiser.lengths is not None
        return self.denoiser.lengths

    def lengths(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        """Of each text, (N,): the one that is asked for, or drawn among those that have room for what is given.

        Control is of the length too, if the model knows what the classes say of it.
        """
        if self.length is not None:
            return torch.full((len(seeds),), self.length)
        room = 1 if self.known is None else least(self.known[None])
        told, weight = None if labels is None else labels.to(device()), 1.0 if self.control is None else self.control
        return self.law.of_seeds(seeds, told, room, weight=weight).cpu()

    def of_length(self, n: int) -> Model:
        """The model of texts of so many tokens, held to those that are given."""
        if self.known is None or self.points is None:
            return self.model
        held = (self.known[:n] >= 0).unsqueeze(1).expand(n, self.points.shape[1])
        return Inpainting(self.model, self.points[:n], held, self.corrections)

    def draw(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        """Texts (N, L), padded; those of one length are drawn together."""
        words, lengths = torch.full((len(seeds), self.law.longest), PAD), self.lengths(seeds, labels)
        for n in lengths.unique().tolist():
            rows = (lengths == n).nonzero().flatten()
            words[rows, :n] = sample_words(
                self.of_length(n),
                self.denoiser.embedding,
                n,
                seeds=[seeds[i] for i in rows.tolist()],
                table=self.table,
                condition=None if labels is None else labels[rows],
                transform=self.transform,
                corrector=self.corrector,
                batch_size=len(rows),
                device=device(),
            )
        return words if self.known is None else torch.where(self.known >= 0, self.known, words)


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
        """Not yet held to what is known, which is of the length of each text: :meth:`WordSampler.of_length`."""
        free = Settings.model(dataclasses.replace(self, known=None, mask=None), denoiser, conditional)
        if self.classifier is None:
            return free
        return GradientControl(
            free, self.classifier.log_prob, self.control, self.section.interval, steps=self.control_steps
        )

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

    foreign = (*DiffusionRun.foreign, *OF_IMAGES)
    families = ("embedding",)
    has_ode = False
    at_once = 1024  # of many lengths, and those of one length are drawn together
    medium: TextMedium

    @property
    def denoiser(self) -> EmbeddingDenoiser:
        """The model with its averaged weights, ready to use."""
        return self.model

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of a text of the likeliest length, all classes alike: what tables are tuned on and compared by."""
        law = self.denoiser.lengths
        assert law is not None
        each = law.law(len(law.logits), torch.arange(len(law.logits)) - 1)
        return int(each.exp().mean(0).argmax()) + 1, self.denoiser.embedding.size

    def states(self, part: Any) -> tuple[Tensor, Tensor | None]:
        """Texts of the commonest length: among their vectors there is no padding."""
        own = part.lengths == part.lengths.mode().values
        vectors = self.denoiser.embedding(part.tokens[own, : int(part.lengths.mode().values)].to(device())).detach()
        return vectors, self.medium.labels(part, own)

    def _with_classes(self) -> TextMedium:
        """The data as a classifier sees them, of a model that is told no classes too."""
        section = self.recipe.data.model_copy(update={"conditional": True})
        return TextMedium(section, self.info, self.folder, self.data)

    def variance(self, choice: Choice) -> Choice:
        if choice == "optimal_per_dimension":
            raise RunError("texts have no dimensions in common, for their lengths differ: take optimal, one for all")
        return super().variance(choice)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sampler(
        self,
        *,
        prompt: str | None = None,
        infill: str | None = None,
        length: int | None = None,
        candidates: int | None = None,
        **settings: Any,
    ) -> WordSampler:
        """The model, table and all else that sampling takes; what is not given is the recipe's.

        Args:
            prompt, infill, length: of :meth:`kuosan.text.medium.TextMedium.given`. The vectors of given words are held
                at every noise level, as parts of a picture are. Without a length, one is drawn for each text.
            candidates: as of a :class:`~kuosan.runs.TokenRun`.
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
        points = None
        if known is None and settings.get("corrections"):
            raise RunError("corrections are by given words: give a prompt, or a text to fill in")
        if known is not None:
            with torch.no_grad():
                points = self.denoiser.embedding(known.clamp_min(0)[None].to(device()))[0].cpu()
            settings |= {"known": points, "mask": (known >= 0)[:, None].expand(points.shape)}
        found = super().sampler(**settings)
        for name in ("known", "mask"):
            found.how.pop(name, None)
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        own: dict[str, Any] = {
            "corrections": settings.get("corrections") or 0,
            "control": settings.get("control"),
        }
        own |= {"denoiser": self.denoiser, "known": known, "points": points, "length": length}
        sampler = WordSampler(**parts | {"how": found.how | asked} | own)
        return (
            sampler if candidates is None else dataclasses.replace(sampler, **with_candidates(candidates, sampler.how))
        )

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
            if given.get("rescale"):
                raise RunError("rescale is of guidance, and control has none: drop it")
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
        self, sampler: Sampler, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int | None = None
    ) -> Iterator[Tensor]:
        """As of other runs; of each batch the texts of one length are drawn together."""
        assert isinstance(sampler, WordSampler)
        if labels is None:
            labels = self.labels_for(len(seeds))
        if labels is None and sampler.control is not None:
            assert self.classes is not None
            labels = torch.arange(len(seeds)) % len(self.classes)  # of a model that is told none, too
        if labels is not None and len(labels) != len(seeds):
            raise ValueError(f"one condition for each seed expected: {len(seeds)} seeds, {len(labels)} conditions")
        n = sampler.candidates
        for part, own in candidate_batches(seeds, labels, n, self.together(batch_size)):
            yield of_least_risk(sampler.draw(part, own), n)

    def draw_while_training(self, model: EmbeddingDenoiser, seeds: Sequence[int]) -> Tensor:  # type: ignore[override]
        table = unmeasured_solver(self.recipe).table(model.process, steps=min(20, self.recipe.sampling.steps))
        transform = Clamp(model.embedding) if self.recipe.sampling.clip else None
        sampler = WordSampler(model, table, transform, None, {}, model)
        return sampler.draw(seeds, self.labels_for(len(seeds)))

    # -- control ------------------------------------------------------------------------------------------------------

    _classifier: NoisyClassifier | None = None

    def noisy_classifier(self, steps: int | None = None, batch_size: int = 256) -> NoisyClassifier:
        """A classifier of texts whose words are noised points of this model: what control takes the gradient of.

        Trained once, on the training texts, and kept in RUN/classifier; trained again if the weights of the model are
        others, or with another number of steps.

        Args:
            steps: of training; default what is kept, or 3,000.
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
                accumulate=2 if kept["batch_size"] % 2 == 0 else 1,
                learning_rate=2e-3,
                warmup=kept["steps"] // 10,
                weight_decay=0.01,
                ema=0.99,
                label_drop=0.0,
                sample_every=0,
            )
            Trainer(
                model=model,
                objective=ClassifierLoss(),
                source=TrainingExamples(self._with_classes()),
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
        if continuous and variance is not None:
            raise RunError("a variance is of reverse steps, and continuous time has none: give --bound-steps K too")
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


def _read(path: Path) -> dict[str, Any]:
    """What a small file of JSON says; nothing, if it is not there or damaged."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}

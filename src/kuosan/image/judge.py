"""How good generated images are, as judged by a classifier that was trained on the real training images only."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from kuosan.image.data import Examples, ImageData, to_pixels

CONFIDENT = 0.9  # a top probability from here on counts as confident


@dataclass(frozen=True)
class Quality:
    """What a judge finds in a set of images; compare it with the judge's `reference`, which is of real ones.

    Attributes:
        samples: how many images were judged.
        confident: the share of images whose top probability is at least 0.9. A classifier can be sure of what is no
            image of any class (the judge of digits is, of half of uniform noise), so read it beside `frechet`.
        confident_error: the binomial standard error of that share.
        classes: the share of images judged to be of each class, by name; they sum to 1.
        frechet: the Frechet distance between this judge's features of the images and of the real training images. Not
            the FID, whose features are another network's. The fewer the images, the larger it is, whatever they show,
            and the more it depends on how many of each class chance has drawn: use 1,000 or more.
        frechet_of_real: the same distance of as many real held-out images, the mean of 10 draws (of all, where there
            are no more than that): what `frechet` is to be compared with.
        agreement: the share of images judged to be of the class that was asked for; None where none was.
        agreement_error: the binomial standard error of that share.
    """

    samples: int
    confident: float
    confident_error: float
    classes: dict[str, float]
    frechet: float
    frechet_of_real: float
    agreement: float | None = None
    agreement_error: float | None = None


class _Classifier(Protocol):
    def probabilities(self, levels: Tensor) -> Tensor: ...
    def features(self, levels: Tensor) -> Tensor: ...
    def state(self) -> dict[str, Tensor]: ...


class Judge:
    """A classifier of real images and the statistics of its features on the real training images.

    Small images (at most 256 values, at most 5,000 to train on: the digits) are judged by a support vector machine with
    calibrated probabilities, whose features are its decision values for every pair of classes; larger ones by a small
    convolutional network, whose features are the 64 of its last hidden layer.

    Attributes:
        data: the name of the data set that the judge was trained on.
        shape: (C, H, W) of the images that it judges.
        level_count: how many levels their values have.
        classes: the names of the classes.
        reference: the quality of the real held-out images, which samples as good as real ones would have.
    """

    def __init__(
        self,
        classifier: _Classifier,
        data: str,
        shape: tuple[int, int, int],
        level_count: int,
        classes: tuple[str, ...],
        statistics: tuple[Tensor, Tensor],
        held_out: Tensor,
    ):
        self.data, self.shape, self.level_count, self.classes = data, shape, level_count, classes
        self.reference: Quality
        self._classifier, self._statistics, self._held_out = classifier, statistics, held_out

    @classmethod
    def train(cls, data: ImageData, seed: int = 0) -> "Judge":
        """Train on the training split; the held-out split only measures the judge.

        The result depends on the data, the seed and, for the network, the number of threads; the support vector
        machine ignores the seed. The caller's random state is left as it was.

        Raises:
            ValueError: the data have no classes, fewer than 5 training images of a class, or fewer than 2 held out.
            ModuleNotFoundError: the images are small and scikit-learn is not installed.
        """
        if data.classes is None or data.train.labels is None or data.held_out.labels is None:
            raise ValueError(f"{data.name} has no classes, and a judge is a classifier: it needs images with classes")
        counts = data.train.labels.bincount(minlength=len(data.classes))
        if counts.min() < 5:
            scarce = data.classes[int(counts.argmin())]
            raise ValueError(f"a judge needs 5 training images of every class; {scarce!r} has {int(counts.min())}")
        if len(data.held_out) < 2:
            raise ValueError(f"a judge needs 2 held-out images to be measured on; {data.name} has {len(data.held_out)}")
        classifier: _Classifier
        if math.prod(data.shape) <= 256 and len(data.train) <= 5000:
            classifier = _SupportVectors(data.train.levels, data.train.labels, data.level_count)
        else:
            classifier = _trained_network(data.train, data.level_count, len(data.classes), seed)
        statistics = _moments(_in_batches(classifier.features, data.train.levels))
        held_out = _in_batches(classifier.features, data.held_out.levels)
        judge = cls(classifier, data.name, data.shape, data.level_count, data.classes, statistics, held_out)
        judge.reference = judge.quality(data.held_out.levels, data.held_out.labels)
        return judge

    @property
    def accuracy(self) -> float:
        """The share of real held-out images that the judge classifies rightly."""
        assert self.reference.agreement is not None  # it was measured with labels
        return self.reference.agreement

    @property
    def reference_confident(self) -> float:
        """The share of real held-out images with a top probability of at least 0.9."""
        return self.reference.confident

    @property
    def reference_frechet(self) -> float:
        """The Frechet distance of the real held-out images (`reference.samples` of them) from the training images."""
        return self.reference.frechet

    def probabilities(self, levels: Tensor) -> Tensor:
        """The probability of each class, float64 (N, classes), for images uint8 (N, C, H, W).

        Raises:
            ValueError: the images are not of the type, shape or levels that the judge was trained on.
        """
        self._check(levels)
        return _in_batches(self._classifier.probabilities, levels)

    def features(self, levels: Tensor) -> Tensor:
        """The features that `Quality.frechet` compares, float64 (N, F), for images uint8 (N, C, H, W).

        Raises:
            ValueError: the images are not of the type, shape or levels that the judge was trained on.
        """
        self._check(levels)
        return _in_batches(self._classifier.features, levels)

    def quality(self, levels: Tensor, labels: Tensor | None = None) -> Quality:
        """Judge at least two images uint8 (N, C, H, W), and with `labels` (N,) whether they are what was asked for.

        Raises:
            ValueError: there are fewer than two images, as many labels as images are not given, or the images are not
                of the type, shape or levels that the judge was trained on.
        """
        count = len(levels)
        if count < 2:
            raise ValueError(f"quality is of a set of at least 2 images, got {count}")
        if labels is not None and labels.shape != (count,):
            raise ValueError(f"expected one label for each of the {count} images, got shape {tuple(labels.shape)}")
        top, judged = self.probabilities(levels).max(dim=1)
        shares = judged.bincount(minlength=len(self.classes)).double() / count
        confident = float((top >= CONFIDENT).double().mean())
        agreement = None if labels is None else float((judged == labels.cpu()).double().mean())
        return Quality(
            samples=count,
            confident=confident,
            confident_error=_standard_error(confident, count),
            classes=dict(zip(self.classes, shares.tolist(), strict=True)),
            frechet=frechet_distance(*_moments(self.features(levels)), *self._statistics),
            frechet_of_real=self._frechet_of_real(count),
            agreement=agreement,
            agreement_error=None if agreement is None else _standard_error(agreement, count),
        )

    def save(self, folder: str | Path) -> None:
        """Write `judge.json` and `judge.safetensors` into a folder, which is made where it does not exist.

        A network is kept as its weights; a support vector machine as its training images, since fitting it again takes
        a fraction of a second.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mean, covariance = self._statistics
        tensors = {**self._classifier.state(), "_mean": mean, "_covariance": covariance, "_held_out": self._held_out}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "judge.safetensors")
        said = {
            "kind": type(self._classifier).__name__,
            "data": self.data,
            "shape": self.shape,
            "level_count": self.level_count,
            "classes": self.classes,
            "reference": asdict(self.reference),
        }
        (folder / "judge.json").write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Judge":
        """The judge that `save` wrote.

        Raises:
            FileNotFoundError: there is no saved judge in the folder.
            ValueError: its files are damaged.
        """
        folder = Path(folder)
        for name in ("judge.json", "judge.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no saved judge ({name} is missing): train one with Judge.train"
                )
        try:
            said = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "judge.safetensors")
            statistics, held_out = (tensors.pop("_mean"), tensors.pop("_covariance")), tensors.pop("_held_out")
            shape, classes, level_count = tuple(said["shape"]), tuple(said["classes"]), said["level_count"]
            classifier: _Classifier
            if said["kind"] == _SupportVectors.__name__:
                classifier = _SupportVectors(tensors["levels"], tensors["labels"], level_count)
            else:
                network = _Network(shape, level_count, len(classes))
                network.load_state_dict(tensors)
                classifier = network.eval()
            judge = cls(classifier, said["data"], shape, level_count, classes, statistics, held_out)
            judge.reference = Quality(**said["reference"])
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"the judge saved in {folder} is damaged: delete it and train it again ({error})"
            ) from error
        return judge

    def _frechet_of_real(self, count: int) -> float:
        available, chance = len(self._held_out), torch.Generator().manual_seed(0)
        if count >= available:
            return frechet_distance(*_moments(self._held_out), *self._statistics)
        draws = [torch.randperm(available, generator=chance)[:count] for _ in range(10)]
        return fmean(frechet_distance(*_moments(self._held_out[draw]), *self._statistics) for draw in draws)

    def _check(self, levels: Tensor) -> None:
        if levels.dtype != torch.uint8 or tuple(levels.shape[1:]) != self.shape:
            raise ValueError(
                f"this judge of {self.data} expects uint8 levels of shape (N, {', '.join(map(str, self.shape))}), "
                f"got {levels.dtype} of shape {tuple(levels.shape)}"
            )
        if levels.numel() and int(levels.max()) >= self.level_count:
            raise ValueError(f"expected levels 0 .. {self.level_count - 1} as in {self.data}, got {int(levels.max())}")


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    r"""The squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982), in float64.

    .. math:: \|m_1 - m_2\|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    The last trace is that of :math:`(C_1^{1/2} C_2 C_1^{1/2})^{1/2}`, which is symmetric, so singular covariances do
    no harm.

    Args:
        mean: (F,), with `covariance` (F, F) the first Gaussian; the other two the second.
    """
    first, second = covariance.double(), other_covariance.double()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    apart = (mean.double() - other_mean.double()).square().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2 * cross))


def nearest(levels: Tensor, reference: Tensor, level_count: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The nearest reference image of each image, and how far it is: is a sample a copy of a training image?

    Exact (the arithmetic is of integers in float64): a copy is at distance 0; of several nearest, the first is given.

    Args:
        levels: uint8 (N, C, H, W).
        reference: uint8 (M, C, H, W), M at least 1.
        level_count: how many levels the values have.
        chunk: how many reference images are compared at a time; only memory and speed depend on it.

    Returns:
        The Euclidean distances float64 (N,), with values in [-1, 1], and the indices int64 (N,) into `reference`.

    Raises:
        ValueError: the shapes of the images differ, or there is no reference image.
    """
    if levels.shape[1:] != reference.shape[1:] or not len(reference):
        raise ValueError(
            f"expected images and reference images of one shape, got {tuple(levels.shape)} and {tuple(reference.shape)}"
        )
    ours = levels.flatten(1).double()
    best = torch.full((len(levels),), math.inf, dtype=torch.float64, device=levels.device)
    index = torch.zeros(len(levels), dtype=torch.int64, device=levels.device)
    for start in range(0, len(reference), chunk):
        theirs = reference[start : start + chunk].flatten(1).double()
        squares = ours.square().sum(1)[:, None] - 2 * ours @ theirs.T + theirs.square().sum(1)
        found, place = squares.min(dim=1)
        closer = found < best
        best[closer], index[closer] = found[closer], place[closer] + start
    return best.sqrt() * (2 / (level_count - 1)), index


def _standard_error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), features.T.cov()


@torch.no_grad()
def _in_batches(function, levels: Tensor) -> Tensor:
    return torch.cat([function(part).double() for part in levels.cpu().split(512)])


class _SupportVectors:
    """A support vector machine with a Gaussian kernel and Platt-scaled probabilities, of scikit-learn."""

    def __init__(self, levels: Tensor, labels: Tensor, level_count: int):
        try:
            from sklearn.calibration import CalibratedClassifierCV
            from sklearn.svm import SVC
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "judging small images needs scikit-learn: pip install 'kuosan[report]'"
            ) from error
        self._levels, self._labels, self._level_count = levels.cpu(), labels.cpu(), level_count
        images, classes = self._flat(levels), labels.numpy(force=True)
        machine = SVC(gamma="scale", C=10.0, decision_function_shape="ovo")
        self._calibrated = CalibratedClassifierCV(SVC(gamma="scale", C=10.0), ensemble=False, cv=5).fit(images, classes)
        self._machine = machine.fit(images, classes)

    def _flat(self, levels: Tensor):
        return to_pixels(levels.cpu().flatten(1), self._level_count).double().numpy()

    def probabilities(self, levels: Tensor) -> Tensor:
        return torch.from_numpy(self._calibrated.predict_proba(self._flat(levels)))

    def features(self, levels: Tensor) -> Tensor:
        return torch.from_numpy(self._machine.decision_function(self._flat(levels))).reshape(len(levels), -1)

    def state(self) -> dict[str, Tensor]:
        return {"levels": self._levels, "labels": self._labels}


class _Network(nn.Module):
    """Convolutions of 3x3, each followed by a halving of the image, down to at most 4 pixels a side; 64 features."""

    def __init__(self, shape: tuple[int, int, int], level_count: int, classes: int):
        super().__init__()
        self._level_count = level_count
        channels, height, width = shape
        layers: list[nn.Module] = []
        wide = 16
        while not layers or max(height, width) > 4:
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
            channels, wide = wide, min(64, 2 * wide)
            height, width = -(-height // 2), -(-width // 2)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def features(self, levels: Tensor) -> Tensor:
        return self.body(to_pixels(levels, self._level_count))

    def forward(self, levels: Tensor) -> Tensor:
        return self.head(self.features(levels))

    def probabilities(self, levels: Tensor) -> Tensor:
        return self(levels).double().softmax(dim=1)

    def state(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


def _trained_network(examples: Examples, level_count: int, classes: int, seed: int) -> _Network:
    """Two passes over the images, or 600 steps where that is more, of AdamW with one cycle of the learning rate."""
    assert examples.labels is not None
    levels, labels = examples.levels.cpu(), examples.labels.cpu()
    batch = min(128, 16 + len(levels) // 16, len(levels))  # small for few images, to pass over them less often
    steps = max(600, 2 * len(levels) // batch)
    chance = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed
        )  # the weights; unlike torch.manual_seed, it leaves a GPU's state alone
        channels, height, width = levels.shape[1:]
        network = _Network((channels, height, width), level_count, classes)
        optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(levels), generator=chance)
            chosen, order = order[:batch], order[batch:]
            loss = functional.cross_entropy(network(levels[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.eval()

"""How good generated texts are: a classifier trained on real texts, how varied they are, and how many are copies."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from kuosan.text.data import TextData, Texts
from kuosan.tokenizer import Tokenizer


class TextJudge:
    """A classifier of texts: logistic regression on the tf-idf of words and pairs of words.

    It sees texts as samples are: what the tokenizer decodes, cut to the data's length and with "<unk>" for unknown
    words, so that real texts have no advantage. Where the tokens are characters, its features are one to three of them.

    Attributes:
        data: the name of the data set that the judge was trained on.
        classes: the names of the classes.
        accuracy: the share of real held-out texts that it classifies rightly.
    """

    def __init__(
        self,
        data: str,
        classes: tuple[str, ...],
        accuracy: float,
        vectorizer: Any,
        weights: np.ndarray,
        bias: np.ndarray,
    ):
        self.data, self.classes, self.accuracy = data, classes, accuracy
        self._vectorizer, self._weights, self._bias = (
            vectorizer,
            weights,
            bias,
        )  # (F -> classes), (classes, F), (classes,)

    @classmethod
    def train(cls, data: TextData) -> "TextJudge":
        """Train on the training split; the held-out split only measures the judge. Nothing is random.

        Raises:
            ValueError: the data have no classes, or fewer than 5 training texts of a class.
            ImportError: scikit-learn is not installed.
        """
        if data.classes is None or data.train.labels is None or data.held_out.labels is None:
            raise ValueError(f"{data.name} has no classes, and a judge is a classifier: it needs texts with classes")
        counts = data.train.labels.bincount(minlength=len(data.classes))
        if counts.min() < 5:
            scarce = data.classes[int(counts.argmin())]
            raise ValueError(f"a judge needs 5 training texts of every class; {scarce!r} has {int(counts.min())}")
        vectorizer = _vectorizer(data.tokenizer.kind, rarest=2 if len(data.train) >= 1000 else 1)
        from sklearn.linear_model import LogisticRegression  # _vectorizer has said what to do if it is not there

        features = vectorizer.fit_transform(_seen(data.train, data.tokenizer))
        fitted = LogisticRegression(C=10.0, tol=1e-3, max_iter=1000).fit(features, data.train.labels.numpy())
        weights, bias = fitted.coef_, fitted.intercept_
        if len(data.classes) == 2:  # then only the second class has weights, the first has zeros
            weights, bias = np.vstack([0 * weights, weights]), np.append(0.0, bias)
        judge = cls(data.name, data.classes, 0.0, vectorizer, weights, bias)
        labels, _ = judge.predict(_seen(data.held_out, data.tokenizer))
        judge.accuracy = float((labels == data.held_out.labels).double().mean())
        return judge

    def predict(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The likeliest class of each text, int64 (N,), and its probability, float64 (N,).

        Args:
            texts: as `Tokenizer.decode` gives them.
        """
        if not len(texts):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        scores = self._vectorizer.transform(texts) @ self._weights.T + self._bias
        confidence, labels = torch.from_numpy(np.asarray(scores)).softmax(dim=1).max(dim=1)
        return labels, confidence

    def save(self, folder: str | Path) -> None:
        """Write `judge.json` and `judge.safetensors` into a folder, which is made where it does not exist."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"weights": self._weights, "bias": self._bias, "idf": self._vectorizer.idf_}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "judge.safetensors")
        said = {
            "data": self.data,
            "classes": self.classes,
            "accuracy": self.accuracy,
            "kind": "character" if self._vectorizer.analyzer == "char" else "word",
            "vocabulary": self._vectorizer.get_feature_names_out().tolist(),
        }
        (folder / "judge.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TextJudge":
        """The judge that `save` wrote.

        Raises:
            FileNotFoundError: there is no saved judge in the folder.
            ValueError: its files are damaged.
            ImportError: scikit-learn is not installed.
        """
        folder = Path(folder)
        for name in ("judge.json", "judge.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no saved judge ({name} is missing): train one with TextJudge.train"
                )
        try:
            said = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "judge.safetensors")
            weights, bias, idf = (arrays[name] for name in ("weights", "bias", "idf"))
            classes, vocabulary = tuple(said["classes"]), said["vocabulary"]
            if weights.shape != (len(classes), len(vocabulary)) or idf.shape != (len(vocabulary),):
                raise ValueError(f"weights of shape {weights.shape} for {len(vocabulary):,} features")
            vectorizer = _vectorizer(said["kind"], vocabulary=vocabulary)
            vectorizer.idf_ = idf
            return cls(said["data"], classes, said["accuracy"], vectorizer, weights, bias)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the judge saved in {folder} is damaged: delete it, train it again ({error})") from error


def distinct(tokens: Tensor, lengths: Tensor, n: int) -> float:
    """Distinct-n (Li et al. 2016): how many different n-grams there are, over how many n-grams there are.

    It falls as texts become more, so compare only sets of as many texts.

    Args:
        tokens: int64 (N, L), of which the first `lengths` (N,) of each row are text.

    Raises:
        ValueError: n is less than 1, or no text has n tokens.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if tokens.shape[1] < n or not bool((lengths >= n).any()):
        raise ValueError(f"no text has {n} tokens, so there is no {n}-gram to count")
    windows = tokens.unfold(1, n, 1)  # (N, L - n + 1, n)
    inside = torch.arange(windows.shape[1]) + n <= lengths[:, None]
    grams = windows[inside]
    return len(grams.unique(dim=0)) / len(grams)


def entropy(tokens: Tensor, lengths: Tensor) -> float:
    """The entropy of the tokens' frequencies in nats: 0 where there is only one token, log V where all are as frequent.

    Args:
        tokens: int64 (N, L), of which the first `lengths` (N,) of each row are text.

    Raises:
        ValueError: there is no token.
    """
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    counts = tokens[inside].bincount().double()
    if not len(counts):
        raise ValueError("the texts have no tokens, so there are no frequencies")
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def copied(samples: Sequence[str], training: Iterable[str]) -> float:
    """The share of samples that are a training text word for word; case and the spaces around words do not count.

    Compare it with the share of real held-out texts: where "<unk>" stands for many words, some of them coincide too.

    Args:
        training: the training texts as `Tokenizer.decode` gives them, where the samples have "<unk>" or were cut.

    Raises:
        ValueError: there are no samples.
    """
    if not len(samples):
        raise ValueError("there are no samples to compare with the training texts")
    known = {_plain(text) for text in training}
    return sum(_plain(sample) in known for sample in samples) / len(samples)


def _plain(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+|[^\w\s]", text.casefold()))


def _seen(texts: Texts, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(row) for row in texts.tokens.tolist()]


def _vectorizer(kind: str, rarest: int = 1, vocabulary: list[str] | None = None) -> Any:
    """scikit-learn's tf-idf of features that occur in at least `rarest` texts, or of the given ones."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ImportError("a judge of texts needs scikit-learn: pip install 'kuosan[text]'") from None
    how: dict[str, Any] = {"min_df": rarest, "vocabulary": vocabulary, "sublinear_tf": True}
    if kind == "character":
        return TfidfVectorizer(analyzer="char", ngram_range=(1, 3), **how)
    return TfidfVectorizer(token_pattern=r"[^\W_]+(?:['’-][^\W_]+)*", ngram_range=(1, 2), **how)

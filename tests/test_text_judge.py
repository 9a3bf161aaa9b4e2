"""The judge tells classes apart and is the same after saving; variety and copies are counted by hand."""

import json
import math
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")

from scipy.stats import entropy as scipy_entropy
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from kuosan.text.data import load
from kuosan.text.judge import TextJudge, copied, distinct, entropy

SUBJECTS = {"animal": ["cat", "dog", "cow"], "food": ["soup", "bread", "rice"], "place": ["town", "river", "hill"]}


def made(tmp_path, classes, count=240, **how):
    """Sentences of a few common words, of which one tells the class."""
    chance = np.random.default_rng(1)
    rows = []
    for n in range(count):
        name = classes[n % len(classes)]
        word = chance.choice(SUBJECTS[name])
        rows.append({"text": f"The {chance.choice(['old', 'new', 'big'])} {word} is {n}", "class": name})
    file = tmp_path / "made.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return load(file, **{"length": 8, "label": "class", "held_out": 0.25, **how})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made(tmp_path_factory.mktemp("made"), tuple(SUBJECTS))


@pytest.fixture(scope="module")
def judge(data):
    return TextJudge.train(data)


def test_the_judge_reads_the_class_off_the_telling_word(judge):
    assert judge.accuracy == 1
    labels, confidence = judge.predict(["the old cow is here", "a new soup", "the big river and the old town"])
    assert [judge.classes[i] for i in labels] == ["animal", "food", "place"]
    assert (labels.dtype, confidence.dtype) == (torch.int64, torch.float64)
    assert (confidence > 0.8).all()


@pytest.mark.parametrize("classes", [("animal", "food"), ("animal", "food", "place")])
def test_confidence_is_scikit_learn_s_probability(tmp_path, classes):
    """The same pipeline by scikit-learn's own predict_proba, for two classes and for more."""
    data = made(tmp_path, classes)
    texts, real = ([data.tokenizer.decode(row) for row in p.tokens] for p in (data.train, data.held_out))
    vectorizer = TfidfVectorizer(token_pattern=r"\w+|<unk>", ngram_range=(1, 2), sublinear_tf=True)
    texts, real = ([t.replace("<unk>", "unk") for t in some] for some in (texts, real))
    theirs = LogisticRegression(C=10.0, tol=1e-3, max_iter=1000)
    theirs.fit(vectorizer.fit_transform(texts), data.train.labels.numpy())
    expected = theirs.predict_proba(vectorizer.transform([*real, ""]))
    labels, confidence = TextJudge.train(data).predict([*real, ""])
    assert np.array_equal(labels, expected.argmax(1))
    assert np.allclose(confidence, expected.max(1), rtol=1e-10)


def test_a_class_without_a_telling_word_is_no_better_than_chance(tmp_path):
    """Labels that the texts do not depend on: 60 held-out texts, within 5 standard errors of a half."""
    chance = np.random.default_rng(2)
    rows = [{"text": f"{a} {b}", "c": str(c)} for n in range(240) for a, b, c in [(n % 7, n % 11, chance.integers(2))]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judge = TextJudge.train(load(tmp_path / "a.jsonl", length=3, label="c", held_out=0.25))
    assert abs(judge.accuracy - 0.5) < 5 * 0.5 / math.sqrt(60)


def test_a_judge_of_characters_reads_characters(tmp_path):
    """No spaces at all, so that there are no words."""
    rows = [{"text": f"{'春山' if n % 2 else '秋水'}{chr(0x4E00 + n)}", "c": n % 2} for n in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judge = TextJudge.train(load(tmp_path / "a.jsonl", length=3, kind="character", label="c", held_out=0.25))
    assert judge.accuracy == 1
    judge.save(tmp_path)
    assert TextJudge.load(tmp_path).predict(["秋水明", "明春山"])[0].tolist() == [0, 1]


def test_a_saved_judge_is_the_same_and_is_no_pickle(judge, tmp_path):
    judge.save(tmp_path / "new" / "judge")
    again = TextJudge.load(tmp_path / "new" / "judge")
    assert (again.data, again.classes, again.accuracy) == (judge.data, judge.classes, judge.accuracy)
    texts = ["the old cow", "soup soup soup", "nothing known", ""]
    for mine, theirs in zip(again.predict(texts), judge.predict(texts), strict=True):
        assert torch.equal(mine, theirs)
    assert {file.name for file in (tmp_path / "new" / "judge").iterdir()} == {"judge.json", "judge.safetensors"}


def test_no_texts_have_no_classes(judge):
    assert [part.shape for part in judge.predict([])] == [(0,), (0,)]


def test_a_judge_that_is_not_there_or_damaged_says_so(judge, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"judge\.json is missing"):
        TextJudge.load(tmp_path)
    judge.save(tmp_path)
    said = json.loads((tmp_path / "judge.json").read_text())
    for broken in ("{", "[]", "{}", json.dumps({**said, "vocabulary": said["vocabulary"][1:]})):
        (tmp_path / "judge.json").write_text(broken)
        with pytest.raises(ValueError, match="is damaged: delete it, train it again"):
            TextJudge.load(tmp_path)
    judge.save(tmp_path)
    (tmp_path / "judge.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        TextJudge.load(tmp_path)


def test_data_that_cannot_have_a_judge_say_why(tmp_path):
    with pytest.raises(ValueError, match="made has no classes"):
        TextJudge.train(made(tmp_path, tuple(SUBJECTS), label=None))
    with pytest.raises(ValueError, match=r"5 training texts of every class; '(animal|food|place)' has [0-4]$"):
        TextJudge.train(made(tmp_path, tuple(SUBJECTS), count=12))


def test_without_scikit_learn_it_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ImportError, match=r"pip install 'kuosan\[text\]'"):
        TextJudge.train(data)


TOKENS = torch.tensor([[5, 6, 5, 6], [5, 6, 9, 9], [7, 0, 0, 0]])
LENGTHS = torch.tensor([4, 2, 1])  # the nines are behind the end


def test_distinct_counts_different_n_grams_over_all():
    """By hand: 5 6 5 6 | 5 6 | 7 has 7 tokens of 3 kinds; pairs 56 65 56 | 56; triples 565 656; 4-grams 5656."""
    assert distinct(TOKENS, LENGTHS, 1) == pytest.approx(3 / 7)
    assert distinct(TOKENS, LENGTHS, 2) == pytest.approx(2 / 4)
    assert distinct(TOKENS, LENGTHS, 3) == 1
    assert distinct(TOKENS, LENGTHS, 4) == 1
    assert distinct(torch.tensor([[1, 1, 1, 1]]), torch.tensor([4]), 3) == pytest.approx(1 / 2)


def test_entropy_is_that_of_the_frequencies():
    """scipy, of the counts 3, 3, 1; even frequencies have log V."""
    assert entropy(TOKENS, LENGTHS) == pytest.approx(scipy_entropy([3, 3, 1]), rel=1e-12)
    assert entropy(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 2])) == pytest.approx(math.log(4))
    assert entropy(torch.tensor([[3, 3]]), torch.tensor([2])) == 0


def test_a_copy_is_word_for_word_whatever_the_case_and_the_spaces():
    training = ["The cat, sat!", "a dog ran", "明月 光"]
    samples = ["the cat , SAT !", "the cat sat", "a dog ran", "a dog ran off", "dog ran", "明月 光"]
    assert copied(samples, training) == pytest.approx(3 / 6)
    assert copied(["x"], []) == 0


def test_sets_without_anything_to_count_are_errors():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct(TOKENS, LENGTHS, 0)
    with pytest.raises(ValueError, match="no text has 5 tokens"):
        distinct(TOKENS, LENGTHS, 5)
    with pytest.raises(ValueError, match="no text has 3 tokens"):
        distinct(TOKENS, LENGTHS.clamp(max=2), 3)
    with pytest.raises(ValueError, match="no tokens"):
        entropy(TOKENS, 0 * LENGTHS)
    with pytest.raises(ValueError, match="no samples"):
        copied([], ["a"])

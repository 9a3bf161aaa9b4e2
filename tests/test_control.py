"""Control of word vectors by a classifier's gradient, where everything is known: Bayes' rule over nine texts."""

import itertools
import math

import pytest
import torch
from torch import nn

from kuosan.denoiser import Denoiser
from kuosan.discrete.control import ClassifierLoss, GradientControl, NoisyClassifier
from kuosan.discrete.embedding import EmbeddingDenoiser, WordEmbedding
from kuosan.prediction import Prediction
from kuosan.process import Process
from kuosan.recipe import Training
from kuosan.schedules import VE, Cosine, Sqrt
from kuosan.solvers import Ancestral, Auto, DPMSolverPP, Inpainting, run
from kuosan.solvers.guidance import ClassifierGuidance
from kuosan.training.checkpoint import CheckpointStore
from kuosan.training.loop import Trainer

V, L, D = 3, 2, 2
#: All texts, a law of them, and the first class's share of each.
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))
LAW = torch.tensor([0.25, 0.02, 0.05, 0.03, 0.3, 0.02, 0.01, 0.12, 0.2], dtype=torch.float64)
FIRST = torch.tensor([0.9, 0.5, 0.2, 0.6, 0.15, 0.7, 0.5, 0.3, 0.05], dtype=torch.float64)
CLASSES = torch.stack([FIRST, 1 - FIRST])
#: p(text | class).
GIVEN = (LAW * CLASSES) / (LAW * CLASSES).sum(1, keepdim=True)
PROCESS = Process(Cosine(log_snr_end=-9.0))


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def points_of(process):
    """Three points of a circle, not evenly."""
    embedding = WordEmbedding(V, D).double()
    angle = torch.tensor([0.3, 1.9, 4.4], dtype=torch.float64)
    with torch.no_grad():
        embedding.weight.copy_(torch.stack([angle.cos(), angle.sin()], 1))
    return embedding.requires_grad_(False)


class Exact(nn.Module):
    """Bayes' rule over all texts: the posterior mean of the vectors, and the law of the class."""

    def __init__(self, process=PROCESS):
        super().__init__()
        self.process, self.embedding = process, points_of(process)

    def log_texts(self, x, t):
        """log p(x_t, text) up to a constant, (B, 9)."""
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        alpha, sigma = (c[:, None] for c in self.process.scales(t))
        apart = x[:, None] - alpha[..., None, None] * self.embedding.points[TEXTS]
        return LAW.log() - (apart**2).sum((2, 3)) / (2 * sigma**2)

    def forward(self, x, t, condition=None):
        assert condition is None  # control is of the model without classes
        law = torch.softmax(self.log_texts(x, t), 1)
        return torch.einsum("bn,nld->bld", law, self.embedding.points[TEXTS])

    def log_prob(self, x, t, condition):
        joint = self.log_texts(x, t)
        return torch.logsumexp(joint + CLASSES[condition].log(), 1) - torch.logsumexp(joint, 1)

    def denoiser(self):
        return EmbeddingDenoiser(self, self.process, self.embedding, "x0")


EXACT = Exact()


def drawn(model, n=4000, solver=None, steps=40):
    """The share of each text among samples of each class."""
    condition, noise = torch.tensor([0, 1]).repeat_interleave(n), dice(7)

    def draw():
        return torch.randn(2 * n, L, D, generator=noise, dtype=torch.float64)

    x = run((solver or DPMSolverPP()).table(PROCESS, steps=steps), model, draw(), draw, condition)
    text = (EXACT.embedding.nearest(x) * torch.tensor([V, 1])).sum(1)
    return torch.stack([part.bincount(minlength=9) / n for part in text.split(n)]).double()


def total_variation(a, b):
    return 0.5 * (a - b).abs().sum(-1)


def reward(shares):
    """The mean probability of the class that was asked for."""
    return (shares * CLASSES).sum(-1)


# -- control of the exact model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "steps"), [(DPMSolverPP(), 40), (Ancestral(), 100), (Auto(), 30)])
def test_control_of_weight_one_is_the_exact_conditional(solver, steps):
    """p(text | class) = p(text) p(class | text) / p(class), by hand; 4,000 exact draws are off by 0.015."""
    shares = drawn(GradientControl(EXACT.denoiser(), EXACT.log_prob), solver=solver, steps=steps)
    assert float(total_variation(shares, GIVEN).max()) < 0.03
    assert float(total_variation(GIVEN, LAW).min()) > 0.2


def test_control_of_no_weight_is_the_model_alone():
    asked = []

    def watched(x, t, condition):
        asked.append(t)
        return EXACT.log_prob(x, t, condition)

    shares = drawn(GradientControl(EXACT.denoiser(), watched, 0.0, steps=3))
    assert float(total_variation(shares, LAW).max()) < 0.03
    assert not asked


@pytest.mark.parametrize("steps", [1, 3])
def test_more_weight_makes_the_class_likelier(steps):
    """The mean of p(class | text), beside that of the law itself."""
    found = [
        reward(drawn(GradientControl(EXACT.denoiser(), EXACT.log_prob, weight, steps=steps), 2000, steps=20))
        for weight in (0.5, 1.0, 3.0)
    ]
    steps_up = torch.stack([reward(LAW.expand(2, -1)), *found]).diff(dim=0)
    assert float(steps_up.min()) > 0.015


def test_more_gradient_steps_push_less_where_the_class_is_clear():
    """Of one weight: a lesser share of the class, and more variety of texts (their entropy)."""
    shares = [drawn(GradientControl(EXACT.denoiser(), EXACT.log_prob, 3.0, steps=k), 2000, steps=20) for k in (1, 3, 8)]
    variety = torch.stack([torch.special.entr(one).sum(-1) for one in shares])
    assert bool((variety.diff(dim=0) > 0.01).all())
    assert bool((torch.stack([reward(one) for one in shares]).diff(dim=0) < 0).all())


# -- the formula -------------------------------------------------------------------------------------------------------


X_T = torch.randn(5, L, D, generator=dice(), dtype=torch.float64)
ASKED = torch.tensor([0, 1, 1, 0, 1])


@pytest.mark.parametrize("t", [0.1, 0.6, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.99], dtype=torch.float64)])
@pytest.mark.parametrize("process", [PROCESS, Process(VE())], ids=["cosine", "ve"])
def test_one_step_is_classifier_guidance(process, t):
    exact = Exact(process)
    one = GradientControl(exact.denoiser(), exact.log_prob, 1.7)(X_T, t, ASKED)
    guided = ClassifierGuidance(exact.denoiser(), exact.log_prob, 1.7)(X_T, t, ASKED)
    torch.testing.assert_close(one.x0, guided.x0)


@pytest.mark.parametrize("form", ["x0", "eps", "v"])
@pytest.mark.parametrize("process", [PROCESS, Process(VE())], ids=["cosine", "ve"])
def test_the_steps_are_gradient_ascent_of_the_printed_sum(process, form):
    """Plain autograd of lambda log N(z; 0, sigma^2) + log p(c | x_t + z), steps of sigma^2 / (lambda i); by hand."""
    exact, weight, t = Exact(process), 2.5, 0.4
    alpha, sigma = (float(c) for c in process.scales(t))
    fluency, z = 1 / weight, torch.zeros_like(X_T)
    for i in (1, 2, 3):
        z = z.detach().requires_grad_()
        aim = exact.log_prob(X_T + z, t, ASKED) - fluency * (z**2).sum((1, 2)) / (2 * sigma**2)
        z = z + sigma**2 / fluency / i * torch.autograd.grad(aim.sum(), z)[0]

    class Speaks:
        """The exact model in another form."""

        def __call__(self, x_t, t, condition=None):
            value = Prediction(process, t, x_t, "x0", exact(x_t, t)).read(form)
            return Prediction(process, t, x_t, form, value)

    model = Speaks()
    model.process = process
    said = GradientControl(model, exact.log_prob, weight, steps=3)(X_T, t, ASKED)
    torch.testing.assert_close(said.x0, exact(X_T, t) + z.detach() / alpha)
    assert said.form == form


def test_many_steps_end_where_the_sum_is_largest():
    """There its gradient is 0: z = w sigma^2 grad log p(c | x_t + z). The steps are harmonic: 1,000 for 1 %."""
    t, weight = 0.5, 1.5
    alpha, sigma = (float(c) for c in PROCESS.scales(t))
    said = GradientControl(EXACT.denoiser(), EXACT.log_prob, weight, steps=1000)(X_T, t, ASKED)
    z = alpha * (said.x0 - EXACT(X_T, t))
    there = (X_T + z).requires_grad_()
    (gradient,) = torch.autograd.grad(EXACT.log_prob(there, t, ASKED).sum(), there)
    torch.testing.assert_close(z, weight * sigma**2 * gradient, rtol=0.01, atol=1e-3)
    assert float(z.detach().abs().max()) > 0.1


def test_control_works_in_its_interval_and_at_each_sample_s_own_time():
    model = GradientControl(EXACT.denoiser(), EXACT.log_prob, 3.0, interval=(0.3, 2.0), steps=2)
    t = torch.tensor([0.01, 0.4, 0.5, 0.97, 0.3], dtype=torch.float64)
    ratio = torch.exp(-0.5 * PROCESS.log_snr(t))
    inside = (ratio > 0.3) & (ratio <= 2)
    assert inside.tolist() == [False, True, True, False, True]
    together = model(X_T, t, ASKED).x0
    for k in range(5):
        alone = model(X_T[k : k + 1], float(t[k]), ASKED[k : k + 1]).x0[0]
        torch.testing.assert_close(together[k], alone)
        moved = float((together[k] - EXACT(X_T[k : k + 1], float(t[k]))[0]).detach().abs().max())
        assert (moved > 1e-3) == bool(inside[k])


def test_what_is_held_stays_under_control():
    """The second word is known: control moves the first one alone."""
    known = EXACT.embedding(torch.tensor([[0, 2]]))[0]
    mask = torch.tensor([[False], [True]]).expand(L, D)
    model = Inpainting(GradientControl(EXACT.denoiser(), EXACT.log_prob, 2.0, steps=2), known, mask)
    shares = drawn(model, 1000, steps=20).reshape(2, V, V)
    torch.testing.assert_close(shares[:, :, 2].sum(1), torch.ones(2, dtype=torch.float64))
    assert float(shares[0, 0, 2]) > float(shares[1, 0, 2]) + 0.1  # FIRST of text (0, 2) is the largest of its column's


# -- the classifier ----------------------------------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    return NoisyClassifier(points_of(PROCESS).float(), PROCESS, L, 2, width=32, depth=1, dropout=0.0)


class Examples:
    shape = (L,)

    def __init__(self, n=4000):
        which = torch.multinomial(LAW, n, replacement=True, generator=dice(1))
        self.tokens = TEXTS[which]
        self.labels = (torch.rand(n, generator=dice(2), dtype=torch.float64) >= FIRST[which]).long()

    def __len__(self):
        return len(self.tokens)

    def arranged(self, index):
        return index

    def untold(self, condition, keep):
        return torch.where(keep, condition, -1)

    def batch(self, index):
        return self.tokens[index], self.labels[index]


def settings(**given):
    return Training(
        **{"steps": 200, "batch_size": 128, "warmup": 20, "learning_rate": 5e-3, "label_drop": 0.0, "sample_every": 0}
        | given
    )


def test_an_untrained_classifier_knows_nothing_and_says_so():
    model = classifier()
    said = model(X_T.float(), 0.3)
    torch.testing.assert_close(said, torch.full((5, 2), -math.log(2)))


def test_a_trained_classifier_is_bayes_rule_and_controls(tmp_path):
    """By the one training loop, 200 steps; against p(c | x_t) by enumeration, and in its place."""
    model = classifier()
    store = CheckpointStore(tmp_path, "one")
    Trainer(model, ClassifierLoss(), Examples(), settings(), 0, store, tmp_path / "log.jsonl").train()
    model.eval().requires_grad_(False)
    assert not any("embedding.weight" in name for name in model.state_dict())
    which = torch.multinomial(LAW, 2000, replacement=True, generator=dice(5))
    for t in (0.1, 0.5, 0.8):
        x_t = PROCESS.corrupt(EXACT.embedding(TEXTS[which]), t, generator=dice(6))
        truth = EXACT.log_prob(x_t, t, torch.zeros(2000, dtype=torch.long)).exp()
        found = model.log_prob(x_t.float(), t, torch.zeros(2000, dtype=torch.long)).exp()
        assert float((found - truth).detach().abs().mean()) < 0.08
    shares = drawn(GradientControl(EXACT.denoiser(), model.log_prob), steps=30)
    assert bool((total_variation(shares, GIVEN) < 0.6 * total_variation(LAW, GIVEN)).all())
    right = (LAW * CLASSES.max(0).values).sum()
    data = Examples()
    assert model.accuracy(data.tokens, data.labels, 1e-3) == pytest.approx(float(right), abs=0.03)
    assert model.accuracy(data.tokens, data.labels, 0.9) < float(right) - 0.03


def said_of_each(model, process, x, t):
    """F of the mean features of each word, by the densities of the points written out; of texts without padding."""
    alpha, sigma = (c[:, None, None, None] for c in process.scales(t))
    start = int(model.embedding.padding)
    points, frequency = model.embedding.points.detach()[start:].double(), model.frequency[start:].double()
    apart = ((x.double()[:, :, None] - alpha * points) ** 2).sum(-1, keepdim=True) / (2 * sigma**2)
    alike = (alpha**2 * points**2).sum(-1, keepdim=True) / (2 * sigma**2)  # of points of one norm the same for all
    words = torch.softmax(frequency[:, None] - apart + alike, 2)
    return model.network((words * model.features[start:].double()).sum(2).float(), (-process.log_snr(t) / 8).float())


@pytest.mark.parametrize("process", [PROCESS, Process(VE()), Process(Sqrt())], ids=["cosine", "ve", "sqrt"])
def test_a_classifier_is_its_printed_formula_at_one_time_or_one_for_each(process):
    torch.manual_seed(3)
    model = NoisyClassifier(points_of(process).float(), process, L, 3, width=16, depth=1, dropout=0.0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    t, x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 3 * X_T.float()
    together = model(x, t)
    said = model.bias[L - 1] + said_of_each(model, process, x, t).sum(1)
    torch.testing.assert_close(together, said - said.logsumexp(1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.exp().sum(1), torch.ones(5))
    for k in range(5):
        torch.testing.assert_close(model(x[k : k + 1], float(t[k]))[0], together[k])
    condition = torch.tensor([0, 2, -1, 1, -1])
    truth = torch.where(condition < 0, 0.0, together[torch.arange(5), condition])
    torch.testing.assert_close(model.log_prob(x, t, condition), truth)


@pytest.mark.parametrize("schedule", [Cosine(log_snr_end=-24.0), VE(), Sqrt()], ids=["cosine", "ve", "sqrt"])
def test_where_there_is_no_signal_control_moves_x0_less_than_words_are_apart(schedule):
    """A network that says anything: sigma^2 / alpha times its gradient would be of any length."""
    torch.manual_seed(3)
    process = Process(schedule)
    model = NoisyClassifier(points_of(process).float(), process, L, 2, width=16, depth=1, dropout=0.0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)

    class Nothing:
        def __call__(self, x_t, t, condition=None):
            return Prediction(process, t, x_t, "x0", torch.zeros_like(x_t))

    nothing = Nothing()
    nothing.process = process
    scale = float(process.alpha(1.0) ** 2 + process.sigma(1.0) ** 2) ** 0.5
    x_t = scale * torch.randn(200, L, D, generator=dice())
    said = GradientControl(nothing, model.log_prob)(x_t, 1.0, torch.zeros(200, dtype=torch.long))
    assert 0 < float(said.x0.detach().flatten(1).norm(dim=1).mean()) < 1


def padded_classifier(length=3):
    """Of up to three words, where token 0 is padding."""
    torch.manual_seed(3)
    points = WordEmbedding(V, D, padding=True).requires_grad_(False)
    model = NoisyClassifier(points, PROCESS, length, 3, width=16, depth=1, dropout=0.0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def test_of_padded_texts_the_words_are_asked_alone():
    """The sum over the words of what the network says of each; the same however much padding follows."""
    model = padded_classifier()
    x, t, n = torch.randn(3, 3, D, generator=dice()), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), [1, 3, 2]
    ended = torch.arange(3) >= torch.tensor(n)[:, None]
    x[ended] = 0
    said = [said_of_each(model, PROCESS, x[k : k + 1, : n[k]], t[k : k + 1]) for k in range(3)]
    truth = torch.stack([model.bias[n[k] - 1] + said[k][0].sum(0) for k in range(3)]).log_softmax(1)
    torch.testing.assert_close(model(x, t), truth)
    alone = torch.cat([model(x[k : k + 1, : n[k]], t[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(alone, truth)
    asked = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(asked, t, torch.tensor([0, 1, 2])).sum(), asked)
    assert not gradient[ended].any()
    assert bool((gradient[~ended].abs().sum(-1) > 0).all())


def test_accuracy_is_of_texts_of_any_length_without_noise_on_their_padding():
    """At next to no noise what it finds likeliest is what it finds of the points themselves."""
    model, seen = padded_classifier(), []
    model.network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    tokens = torch.tensor([[1, 0, 0], [2, 1, 0], [1, 2, 2]])
    with torch.no_grad():
        likeliest = [
            int(model(PROCESS.alpha(1e-3).float() * model.embedding(w), 1e-3).argmax()) for w in tokens[:, None]
        ]
    assert model.accuracy(tokens, torch.tensor(likeliest), 1e-3) == 1
    assert model.accuracy(tokens, (torch.tensor(likeliest) + 1) % 3, 1e-3) == 0
    assert torch.equal((seen[-1] == 0).all(-1), tokens == 0)


def test_the_loss_is_the_surprise_at_the_class_without_noise_on_padding():
    model = padded_classifier()
    w, labels = torch.tensor([[1, 0], [2, 1], [1, 0]]), torch.tensor([0, 1, 2])
    t, noise = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), torch.randn(3, 3, D, generator=dice())
    vectors = model.embedding.points[w]
    alpha, sigma = (c.float()[:, None, None] for c in PROCESS.scales(t))
    x_t = torch.where((w > 0)[..., None], alpha * vectors + sigma * noise[:, :2], 0.0)
    truth = -model(x_t, t)[torch.arange(3), labels]
    for whole in (w, torch.tensor([[1, 0, 0], [2, 1, 0], [1, 0, 0]])):
        torch.testing.assert_close(ClassifierLoss()(model, whole, labels, t=t, noise=noise), truth)
    assert ClassifierLoss().noise_shape(model, (L,)) == (L, D)
    model = classifier()
    drawn_alone = ClassifierLoss()(model, TEXTS, torch.zeros(9, dtype=torch.long), generator=dice())
    assert drawn_alone.shape == (9,)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: NoisyClassifier(EXACT.embedding, PROCESS, L, 1), "at least 2 classes"),
        (lambda: GradientControl(EXACT.denoiser(), EXACT.log_prob, steps=0), "steps must be at least 1"),
        (lambda: GradientControl(EXACT.denoiser(), EXACT.log_prob, -1.0, steps=2), "fluency weight is positive"),
        (lambda: GradientControl(EXACT.denoiser(), EXACT.log_prob, steps=2).energy(X_T, 0.5, ASKED), "no energy"),
        (lambda: classifier().log_prob(X_T.float(), 0.5, None), "a class for each of 5"),
        (lambda: classifier().log_prob(X_T.float(), 0.5, ASKED[:2]), "a class for each of 5"),
        (
            lambda: classifier().log_prob(X_T.float(), 0.5, ASKED + 1),
            r"classes are 0 to 1, or -1 for any; got \[1, 2\]",
        ),
        (lambda: ClassifierLoss()(classifier(), TEXTS), "label_drop must be 0"),
        (lambda: ClassifierLoss()(classifier(), TEXTS[:2], torch.tensor([0, -1])), "label_drop must be 0"),
        (lambda: classifier().accuracy(TEXTS, ASKED, 0.5), "one class for each text"),
    ],
)
def test_what_cannot_be_asked_is_refused(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()


def test_a_model_that_is_an_energy_keeps_it_under_one_step():
    """E - w log p(c | x_t): of a denoiser with an energy, the gradient of which is what control adds."""

    class Bowl(nn.Module):
        def forward(self, x, t, condition=None):
            return (x**2).flatten(1).sum(1)

    denoiser = Denoiser(Bowl(), PROCESS, "energy")
    model = GradientControl(denoiser, EXACT.log_prob, 2.0)
    x = X_T.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.energy(x, 0.4, ASKED).sum(), x)
    torch.testing.assert_close(-gradient, model(X_T, 0.4, ASKED).score)

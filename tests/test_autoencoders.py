"""Autoencoders: laws that are laws, ladders that look where they say, a bound that is one, and runs like any other."""

import itertools
import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from kuosan import Chain, Gaussian, build
from kuosan import recipe as recipes
from kuosan.autoencoders import DECODERS, Autoencoder
from kuosan.autoencoders.heads import Decoder, FlowHead, GaussianHead, Perceptron
from kuosan.autoencoders.hierarchy import BottomUp, TopDown
from kuosan.autoencoders.objective import Elbo
from kuosan.cli import main
from kuosan.decoders import DiscretisedGaussian
from kuosan.kernels import Generative, Guide
from kuosan.recipe import RecipeError
from kuosan.runs import AutoencoderRun, RunError
from kuosan.train import train
from test_training import assert_same, end_of, losses, stop_at, train_with


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def shaken(module, size=0.3, seed=0):
    """The module with noise in all its parameters: much of it begins as zero."""
    generator = dice(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def seeded(maker, *words, **settings):
    torch.manual_seed(0)
    return maker(*words, **settings)


def images(n, levels=5, shape=(1, 2, 3), seed=1):
    """Pixels on their levels."""
    return torch.randint(levels, (n, *shape), generator=dice(seed)) * (2 / (levels - 1)) - 1


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


# -- laws that a flow makes --------------------------------------------------------------------------------------------


def flow(outputs, size=0.3):
    return shaken(seeded(FlowHead, 3, outputs, 16, 1, transforms=2, context=4).double(), size)


def given(n=1):
    return torch.tensor([[0.4, -0.7, 0.2]], dtype=torch.float64).expand(n, -1)


def test_the_density_of_a_flow_integrates_to_one():
    """The sum over a square grid of 2-D; what is outside, a draw never reaches."""
    head = flow(2)
    z = head(given(20_000)).sample(generator=dice()).detach()
    low, high = z.min(0).values - 1.5, z.max(0).values + 1.5
    axes = [torch.linspace(float(a), float(b), 500, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    points = torch.cartesian_prod(*axes)
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    assert float(head(given(len(points))).log_prob(points).detach().exp().sum() * cell) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_the_slow_way_back_through_a_flow_finds_what_it_remembers_of_its_draw(outputs):
    """The inverse, coordinate by coordinate, against the log-determinant of the way there."""
    law = flow(outputs).requires_grad_(False)(given(50))
    z = law.sample(generator=dice(1))
    remembered = law.log_prob(z)
    assert remembered.shape == (50,)
    torch.testing.assert_close(law.log_prob(z.clone()), remembered, rtol=0, atol=1e-9)
    other = law.sample(generator=dice(2))
    torch.testing.assert_close(law.log_prob(z), remembered, rtol=0, atol=1e-9)  # z is no longer the last draw
    assert float((law.log_prob(other) - remembered).abs().min()) > 0


def test_the_density_of_a_flow_is_that_of_its_noise_over_the_jacobian():
    """The Jacobian of the whole way from standard-normal noise to z, by autograd; its determinant by numpy."""
    head = flow(3)
    noise = torch.randn(4, 3, generator=dice(3), dtype=torch.float64)
    for u in noise:
        jacobian = torch.autograd.functional.jacobian(lambda one: head(given()).sample(one[None])[0], u).numpy()
        assert abs(np.triu(jacobian, 1)).max() > 0.01  # the coordinates mix both ways, or this would say little
        assert abs(np.tril(jacobian, -1)).max() > 0.01
        truth = stats.norm.logpdf(u.numpy()).sum() - np.linalg.slogdet(jacobian)[1]
        law = head(given())
        assert law.log_prob(law.sample(u[None])).item() == pytest.approx(truth, abs=1e-9)


def test_a_flow_begins_as_the_gaussian_of_its_network():
    """scipy's normal density with the network's first numbers."""
    head = seeded(FlowHead, 3, 2, 16, 1).double()
    mean, raw = head.network(given())[0, :4].detach().numpy().reshape(2, 2)
    std = np.sqrt(np.exp(8 * np.tanh(raw / 8)))
    law = head(given())
    z = law.sample(generator=dice())
    assert float(law.log_prob(z).detach()) == pytest.approx(
        stats.norm.logpdf(z[0].detach().numpy(), mean, std).sum(), abs=1e-9
    )
    assert float(law.log_prob(z.clone()).detach()) == pytest.approx(float(law.log_prob(z).detach()), abs=1e-9)
    np.testing.assert_allclose(law.mean[0].detach(), mean, atol=1e-12)


def test_without_zuko_a_flow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match="a flow posterior needs zuko: pip install 'kuosan\\[likelihood\\]'"):
        Autoencoder((1, 2, 3), 5, latent=2, posterior="flow", width=8, depth=1)
    Autoencoder((1, 2, 3), 5, latent=2, width=8, depth=1)  # the Gaussian does not need it


def test_without_zuko_the_command_says_what_to_install(monkeypatch, capsys, tiny, tmp_path):
    monkeypatch.setitem(sys.modules, "zuko", None)
    assert main(["train", str(tiny), "autoencoder.posterior=flow", "--out", str(tmp_path / "run")]) in (1, 2)
    assert "pip install" in capsys.readouterr().err


# -- laws of the data --------------------------------------------------------------------------------------------------

SHAPE = (2, 3, 1)


def decoder(kind, levels=5, size=1.0):
    return shaken(seeded(Decoder, kind, SHAPE, levels, lambda n, _: Perceptron(3, 6 * n, 16, 1)).double(), size)


@pytest.mark.parametrize("kind", ["levels", "mixture", "discretised"])
@pytest.mark.parametrize("levels", [2, 5])
def test_the_chances_of_all_levels_add_up_to_one(kind, levels):
    """Every level in turn at every coordinate."""
    with torch.no_grad():
        law = decoder(kind, levels)(torch.randn(4, 3, generator=dice(), dtype=torch.float64))
    values = torch.linspace(-1, 1, levels)
    chances = torch.stack([law.log_prob(torch.full((4, *SHAPE), float(v))) for v in values]).exp()
    assert chances.shape == (levels, 4, *SHAPE)
    assert float(chances.std()) > 0.05
    torch.testing.assert_close(chances.sum(0), torch.ones_like(chances[0]), rtol=0, atol=1e-5)
    drawn = law.sample(generator=dice(1))
    assert drawn.shape == (4, *SHAPE)
    assert float((drawn.flatten()[:, None] - values).abs().min(1).values.max()) < 1e-6
    assert law.mean.shape == (4, *SHAPE)


def test_the_density_of_a_gaussian_decoder_integrates_to_one():
    """A Riemann sum at every coordinate, far beyond 20 standard deviations."""
    law = decoder("gaussian", size=0.3)(torch.randn(4, 3, generator=dice(), dtype=torch.float64))
    assert law.mean.shape == law.variance.shape == (4, *SHAPE)
    width = 20 * float(law.std.max()) + float(law.mean.abs().max())
    values = torch.linspace(-width, width, 100_001, dtype=torch.float64)
    density = law.log_prob(values.view(-1, 1, 1, 1, 1)).exp()
    total = density.sum(0) * float(values[1] - values[0])
    torch.testing.assert_close(total.double(), torch.ones(4, *SHAPE).double(), rtol=0, atol=1e-4)


def test_only_a_gaussian_decoder_is_a_density():
    made = {kind: seeded(Autoencoder, (1, 2, 3), 5, 2, decoder=kind, width=8, depth=1) for kind in DECODERS}
    assert {kind: one.model.discrete for kind, one in made.items()} == {
        "levels": True,
        "mixture": True,
        "discretised": True,
        "shared": True,
        "gaussian": False,
    }
    x = images(3)
    for one in made.values():
        assert one.elbo(x, estimator="path").discrete == one.model.discrete
    off = torch.full((1, 1, 2, 3), 0.3)
    made["gaussian"].elbo(off, estimator="path")
    for kind in ("levels", "mixture", "discretised", "shared"):
        with pytest.raises(ValueError, match="must lie on the 5 even levels"):
            made[kind].elbo(off, estimator="path")


# -- who looks at whom -------------------------------------------------------------------------------------------------

LADDERS = pytest.mark.parametrize(
    ("inference", "skip", "layers"), list(itertools.product(["bottom_up", "top_down"], [False, True], [1, 2, 3]))
)


def ladder(inference="top_down", skip=False, layers=3, latent=8, size=0.3, **settings):
    settings = {"width": 16, "depth": 1} | settings
    made = seeded(Autoencoder, (1, 2, 3), 5, latent=latent, layers=layers, inference=inference, skip=skip, **settings)
    return shaken(made, size)


def numbers_of(law):
    return law.log_probs if hasattr(law, "log_probs") else torch.cat([law.mean, law.variance], 1)


def looks_at(kernel, parents):
    """Which of the parents a law depends on: those that move it when they alone are moved."""
    before, found = numbers_of(kernel(parents)), []
    for k in range(len(parents)):
        moved = tuple(z + (0.5 if j == k else 0) for j, z in enumerate(parents))
        if not torch.equal(numbers_of(kernel(moved)), before):
            found.append(k)
    return found


@LADDERS
def test_each_layer_has_half_the_size_of_the_one_below(inference, skip, layers):
    """8, 4, 2; of q as of p."""
    model = ladder(inference, skip, layers)
    sizes = [8, 4, 2][:layers]
    assert model.length == layers
    assert model.model.shapes == ((1, 2, 3), *((size,) for size in sizes))
    path = model.path(images(5), generator=dice())
    drawn = model.generate(torch.randn(5, 6 + sum(sizes), generator=dice()))
    for one in (path, drawn):
        assert [tuple(z.shape) for z in one.z] == [(5, 1, 2, 3), *((5, size) for size in sizes)]


@LADDERS
def test_p_looks_at_the_next_layer_and_with_skips_at_all_above(inference, skip, layers):
    """Every latent moved alone."""
    model = ladder(inference, skip, layers)
    z = model.path(images(5), generator=dice()).z
    for i in range(layers):
        above = tuple(z[i + 1 :])
        assert looks_at(lambda parents, i=i: model.model.down(i, parents), above) == (
            list(range(len(above))) if skip else [0]
        )
    assert model.model.markov == (not skip)
    prior = model.model.prior()
    assert float(prior.mean.abs().max()) == 0
    assert float((prior.variance - 1).abs().max()) == 0


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_q_that_goes_up_looks_at_the_layer_below_alone(layers, skip):
    model = ladder("bottom_up", skip, layers)
    z = model.path(images(5), generator=dice()).z
    for i in range(1, layers + 1):
        below = tuple(reversed(z[:i]))
        assert looks_at(lambda parents, i=i: model.guide.up(i, parents, z[0]), below) == [0]
    assert isinstance(model.guide, BottomUp)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_q_that_comes_down_looks_at_x_and_what_p_looks_at(layers, skip):
    model = ladder("top_down", skip, layers)
    x = images(5)
    z = model.path(x, generator=dice()).z
    for i in range(1, layers + 1):
        above = tuple(z[i + 1 :])
        features = model.guide.read(x)
        seen = looks_at(lambda parents, i=i, f=features: model.guide.posterior(i, parents, f), above)
        assert seen == (list(range(len(above))) if skip else [0][: len(above)])
        of_x = looks_at(lambda one, i=i, a=above: model.guide.posterior(i, a, model.guide.read(one[0])), (x,))
        assert of_x == [0]
    assert isinstance(model.guide, TopDown)


@pytest.mark.parametrize("inference", ["bottom_up", "top_down"])
def test_a_latent_moves_the_laws_of_those_drawn_after_it_and_no_others(inference):
    """The noise of one layer changed: going up, the layers above feel it; coming down, those below."""
    model, x = ladder(inference), images(5)
    noise = [torch.randn(5, size, generator=dice(size)) for size in (8, 4, 2)]
    before = model.path(x, noise=noise).laws
    for moved in (1, 2, 3):
        other = [part + (0.5 if i == moved else 0) for i, part in enumerate(noise, 1)]
        after = model.path(x, noise=other).laws
        felt = {i for i in (1, 2, 3) if not torch.equal(numbers_of(before[i]), numbers_of(after[i]))}
        assert felt == {i for i in (1, 2, 3) if (i > moved if inference == "bottom_up" else i < moved)}


@LADDERS
@pytest.mark.parametrize("posterior", ["gaussian", "flow"])
def test_the_gradient_of_the_bound_reaches_every_parameter(inference, skip, layers, posterior):
    model = ladder(inference, skip, layers, posterior=posterior)
    Elbo()(model, images(20), generator=dice()).mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert not silent
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_dropout_is_for_training_and_never_in_the_bound():
    """The same numbers in whatever mode the model is left; the loss in training is another each time."""
    model, x = ladder(dropout=0.5), images(30)
    model.eval()
    calm = model.elbo(x, estimator="path").total
    weighted = model.importance_weighted(x, samples=4).log_prob
    model.train()
    assert torch.equal(model.elbo(x, estimator="path").total, calm)
    assert torch.equal(model.importance_weighted(x, samples=4).log_prob, weighted)
    assert model.training
    assert all(part.training for part in model.modules())
    noise = torch.randn(30, 14, generator=dice())
    assert not torch.equal(Elbo()(model, x, noise=noise), Elbo()(model, x, noise=noise))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inference": "sideways"}, "inference must be one of bottom_up, top_down, got 'sideways'"),
        ({"posterior": "cauchy"}, "posterior must be one of gaussian, flow, got 'cauchy'"),
        (
            {"decoder": "poisson"},
            "decoder must be one of levels, mixture, discretised, shared, gaussian, got 'poisson'",
        ),
        ({"latent": 7, "layers": 4}, "4 of them from latent = 7 on cannot be"),
        ({"layers": 0}, "0 of them from latent = 8 on cannot be"),
        ({"width": 0}, "width must lie in 1 to 65536"),
    ],
)
def test_an_autoencoder_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Autoencoder((1, 2, 3), 5, **{"latent": 8, "width": 8, "depth": 1} | settings)
    Autoencoder((1, 2, 3), 5, latent=8, layers=4, width=8, depth=1)  # 8, 4, 2, 1: the most that there can be


# -- what it is trained on ---------------------------------------------------------------------------------------------


def by_hand(model, x, noise):
    """(-log p(x|z), KL of z_1, KL of z_2), each (B,), of two layers coming down: by torch.distributions."""
    normal, features = torch.distributions.Normal, model.guide.read(x)
    q_2 = model.guide.heads[1](features)
    z_2 = q_2.mean + q_2.variance.sqrt() * noise[:, 8:]
    q_1 = model.guide.heads[0](torch.cat([features, z_2], 1))
    z_1 = q_1.mean + q_1.variance.sqrt() * noise[:, :8]
    p_1 = model.model.heads[0](z_2)
    logits = model.model.decoder.network(z_1).view(len(x), *x.shape[1:], 5)
    decoding = -torch.distributions.Categorical(logits=logits).log_prob(((x + 1) * 2).round()).flatten(1).sum(1)

    def kl(q, mean, std):
        return torch.distributions.kl_divergence(normal(q.mean, q.variance.sqrt()), normal(mean, std)).sum(1)

    zero = torch.zeros_like(q_2.mean)
    return decoding, kl(q_1, p_1.mean, p_1.variance.sqrt()), kl(q_2, zero, zero + 1)


def test_the_loss_is_what_it_costs_to_say_x_and_its_latents_per_dimension():
    """Each term by torch.distributions, from the same noise: z_1 takes the first numbers, z_2 the last."""
    model, x, noise = ladder(layers=2), images(30), torch.randn(30, 12, generator=dice())
    assert Elbo().noise_shape(model, (1, 2, 3)) == (12,)
    truth = sum(by_hand(model, x, noise)) / 6
    loss = Elbo()(model, x, noise=noise)
    assert loss.shape == (30,)
    torch.testing.assert_close(loss, truth, rtol=1e-4, atol=1e-4)
    assert torch.equal(loss, Elbo()(model, x, noise=noise))
    assert not torch.equal(loss, Elbo()(model, x, noise=noise + 1))


def test_warming_up_the_divergences_count_from_nearly_nothing_to_all():
    """Step k of 4 counts (k + 1) / 4 of them; out of training, and ever after, all."""
    model, x, noise = ladder(layers=2), images(30), torch.randn(30, 12, generator=dice())
    decoding, *divergences = by_hand(model, x, noise)
    assert float(sum(divergences).min()) > 0.5
    for step, beta in ((0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (1000, 1.0), (None, 1.0)):
        loss = Elbo(warmup=4)(model, x, noise=noise, step=step)
        torch.testing.assert_close(loss, (decoding + beta * sum(divergences)) / 6, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Elbo()(model, x, noise=noise, step=0), Elbo()(model, x, noise=noise), rtol=0, atol=0)


def test_free_bits_are_of_each_layer_and_each_example():
    """The larger of both by numpy; some divergences are above, some below, in both layers."""
    model, x, noise = ladder(layers=2), images(60), torch.randn(60, 12, generator=dice())
    decoding, *divergences = (one.detach().numpy() for one in by_hand(model, x, noise))
    free = float(np.median(np.concatenate(divergences)))
    for one in divergences:
        assert 0 < (one > free).sum() < 60
    truth = (decoding + sum(np.maximum(one, free) for one in divergences)) / 6
    loss = Elbo(free_bits=free)(model, x, noise=noise)
    np.testing.assert_allclose(loss.detach(), truth, rtol=1e-4, atol=1e-4)
    alone = torch.cat([Elbo(free_bits=free)(model, x[i : i + 1], noise=noise[i : i + 1]) for i in range(60)])
    torch.testing.assert_close(alone, loss, rtol=1e-4, atol=1e-4)  # whatever the company


@pytest.mark.parametrize("free_bits", [0.0, 1e9])
def test_a_layer_below_its_free_bits_is_left_alone(free_bits):
    """Nothing pulls a q on which p(x|z) does not depend, if all its bits are free."""
    model = ladder(layers=1)
    with torch.no_grad():
        model.model.decoder.network.enter.weight.zero_()
    Elbo(free_bits=free_bits)(model, images(20), generator=dice()).mean().backward()
    pull = max(float(p.grad.abs().max()) for p in model.guide.parameters() if p.grad is not None)
    assert (pull == 0) == (free_bits > 0)


@pytest.mark.parametrize(
    ("inference", "skip", "posterior"),
    [("bottom_up", False, "gaussian"), ("top_down", True, "gaussian"), ("top_down", False, "flow")],
)
def test_the_loss_is_minus_the_bound_on_average(inference, skip, posterior):
    """Copies of one x, the bound along paths without any closed form: 5 standard errors of the difference."""
    model = ladder(inference, skip, 2, size=0.15, posterior=posterior, latent=4)
    x = images(1).expand(6000, -1, -1, -1)
    with torch.no_grad():
        one, error = mean_and_error(Elbo()(model, x, generator=dice(5)))
    other, other_error = mean_and_error(-model.elbo(x, estimator="path", seed=6).total / 6)
    assert one == pytest.approx(other, abs=5 * math.hypot(error, other_error))
    assert math.hypot(error, other_error) < 0.05


@pytest.mark.parametrize("settings", [{"warmup": -1}, {"free_bits": -0.1}, {"free_bits": math.nan}])
def test_a_negative_warmup_or_a_debt_of_bits_is_refused(settings):
    with pytest.raises(ValueError, match="warmup and free_bits are never negative"):
        Elbo(**settings)


# -- a world of 25 states, whose log P is known ------------------------------------------------------------------------


@dataclass
class World:
    """Two coordinates of five levels, and the chance of each of their 25 states."""

    chances: np.ndarray

    @property
    def states(self):
        index = torch.cartesian_prod(torch.arange(5), torch.arange(5))
        return (index.float() / 2 - 1).view(25, 1, 1, 2)

    @property
    def weights(self):
        return torch.from_numpy(self.chances.reshape(-1))

    @property
    def mean_log(self):
        """The most that any model can have on average."""
        return float((self.chances * np.log(self.chances)).sum())

    @property
    def mean_log_of_independence(self):
        marginals = self.chances.sum(0), self.chances.sum(1)
        return float(sum((one * np.log(one)).sum() for one in marginals))

    def draw(self, n, generator):
        return self.states[torch.multinomial(self.weights, n, replacement=True, generator=generator)]


def fit(model, draw, steps=500, batch_size=256):
    """Adam on minus the bound, the rate falling to zero."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator, objective = dice(7), Elbo(warmup=steps // 4)
    for step in range(steps):
        optimiser.zero_grad()
        objective(model, draw(batch_size, generator), generator=generator, step=step).mean().backward()
        optimiser.step()
        decay.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def world():
    """The second coordinate is nearly the mirror image of the first."""
    index = np.arange(5)
    chances = np.exp(-0.5 * ((index[:, None] + index - 4) / 0.9) ** 2)
    chances *= np.random.default_rng(0).uniform(0.7, 1.3, (5, 5))
    return World(chances / chances.sum())


def learned_by(world, **settings):
    return fit(seeded(Autoencoder, (1, 1, 2), 5, latent=2, width=32, depth=1, **settings), world.draw)


@pytest.fixture(scope="module")
def learned(world):
    return learned_by(world)


def weighted(world, values):
    """Mean and standard error of repeats (R, 25) of all states, each with its chance."""
    return mean_and_error(values.double() @ world.weights)


def test_a_trained_vae_knows_the_world_and_claims_no_more_than_is_true(world, learned):
    """Truth: the entropy of the 25 chances; and of the model's own P(x), a sum over a grid of z."""
    axis = torch.linspace(-8, 8, 321)
    z = torch.cartesian_prod(axis, axis)
    prior = torch.from_numpy(stats.norm.pdf(z.double().numpy()).prod(1)) * float(axis[1] - axis[0]) ** 2
    law = learned.model.down(0, (z,))
    said = torch.stack([law.log_prob(x[None].expand(len(z), -1, -1, -1)).flatten(1).sum(1) for x in world.states])
    log_p = (said.double().exp() @ prior).log()
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-4)

    repeats = world.states.repeat(400, 1, 1, 1)
    bound, error = weighted(world, learned.elbo(repeats, estimator="path", analytic=True).total.view(400, 25))
    tighter = learned.importance_weighted(repeats, samples=16).log_prob.view(400, 25)
    importance, importance_error = weighted(world, tighter)
    own = float(log_p @ world.weights)
    assert world.mean_log_of_independence < world.mean_log - 0.5
    assert bound > world.mean_log - 0.15  # it learned; a model of independent coordinates is 0.5 below at least
    assert own < world.mean_log  # Gibbs's inequality
    assert bound < own + 5 * error
    assert bound - 5 * math.hypot(error, importance_error) < importance < own + 5 * importance_error
    assert importance > own - 0.5 * (own - bound)  # most of the gap is closed


@pytest.mark.parametrize("settings", [{"layers": 2}, {"layers": 2, "inference": "bottom_up", "skip": True}])
def test_two_layers_learn_it_too(world, settings):
    """Truth: the entropy of the world."""
    model = learned_by(world, **settings)
    repeats = world.states.repeat(200, 1, 1, 1)
    bound, error = weighted(world, model.elbo(repeats, estimator="path").total.view(200, 25))
    assert world.mean_log - 0.25 < bound < world.mean_log + 5 * error


def test_samples_of_a_trained_vae_come_as_often_as_in_the_world(world, learned):
    """Total variation from the 25 true chances; of independent coordinates it would be far larger."""
    drawn = learned.generate(torch.randn(20_000, 4, generator=dice(9))).z[0]
    index = ((drawn.view(-1, 2) + 1) * 2).round().long()
    counts = torch.bincount(index[:, 0] * 5 + index[:, 1], minlength=25).double() / len(index)
    independent = np.outer(world.chances.sum(1), world.chances.sum(0)).reshape(-1)
    assert 0.5 * float((counts - world.weights).abs().sum()) < 0.08
    assert 0.5 * np.abs(independent - world.weights.numpy()).sum() > 0.3


# -- theory row 4: a posterior that bends ------------------------------------------------------------------------------


class Banana(Generative):
    """x says where z_2 - z_1^2 is: the posterior is a parabola, which no Gaussian is like. Nothing is learned."""

    length, shapes, discrete = 1, ((1, 1, 1), (2,)), True

    def prior(self, condition=None):
        return Gaussian(torch.zeros(1, 2), torch.ones(1, 2))

    def down(self, i, above, condition=None):
        mean = (0.5 * (above[0][:, 1] - above[0][:, 0] ** 2 + 1)).view(-1, 1, 1, 1)
        return DiscretisedGaussian(mean, torch.full_like(mean, 0.01), 5)


@dataclass
class Grid2:
    """p(z, x) of the banana on a grid, by scipy: every level's chance and its posterior."""

    z: np.ndarray
    joint: np.ndarray

    @classmethod
    def make(cls):
        axis = np.linspace(-6, 6, 601)
        z = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        mean = 0.5 * (z[:, 1] - z[:, 0] ** 2 + 1)
        edges = np.array([-np.inf, -0.75, -0.25, 0.25, 0.75, np.inf])
        chances = np.diff(stats.norm.cdf((edges - mean[:, None]) / 0.1), axis=1)
        prior = stats.norm.pdf(z).prod(1) * (axis[1] - axis[0]) ** 2
        return cls(z, prior[:, None] * chances)

    @property
    def chances(self):
        return self.joint.sum(0)

    def nearest_gaussian(self, level):
        """KL(p(z|x) || the Gaussian of its moments), nats."""
        weight = self.joint[:, level] / self.chances[level]
        mean = weight @ self.z
        cov = (self.z - mean).T @ ((self.z - mean) * weight[:, None])
        density = weight / (self.z[1, 1] - self.z[0, 1]) ** 2
        normal = stats.multivariate_normal(mean, cov).logpdf(self.z)
        inside = weight > 1e-300
        return float(weight[inside] @ (np.log(density[inside]) - normal[inside]))


def test_with_the_same_decoder_a_flow_gets_nearer_to_the_likelihood_than_a_gaussian():
    """Row 4 of the theory: the bound lacks KL(q(z|x) || p(z|x)). Truth: P of every level and p(z|x) on a grid of z."""
    truth = Grid2.make()
    assert truth.chances.sum() == pytest.approx(1, abs=1e-6)
    assert truth.chances @ [truth.nearest_gaussian(level) for level in range(5)] > 0.2
    levels = torch.linspace(-1, 1, 5).view(5, 1, 1, 1)
    chances = torch.from_numpy(truth.chances)

    def draw(n, generator):
        return levels[torch.multinomial(chances, n, replacement=True, generator=generator)]

    found = {}
    for name, head in (("gaussian", GaussianHead), ("flow", FlowHead)):
        guide = seeded(TopDown, (1, 2), head, False, 32, 1, 0.0)
        model = fit(Chain(guide, Banana()), draw, 800, batch_size=128)
        total = model.elbo(levels.repeat(800, 1, 1, 1), estimator="path", seed=3).total.view(800, 5)
        found[name] = mean_and_error(total.double() @ chances)
    best = float(truth.chances @ np.log(truth.chances))
    (gaussian, error), (flow, flow_error) = found["gaussian"], found["flow"]
    assert flow < best + 5 * flow_error
    assert flow - gaussian > 5 * math.hypot(error, flow_error)
    assert best - flow < 0.5 * (best - gaussian)


# -- drawing from p ----------------------------------------------------------------------------------------------------


class Straight(Generative):
    """z_2 ~ N(0.5, 2), z_1 = A z_2 + 1 + N(0, 0.3), x = C z_1 + D z_2 + N(0, 0.1): 1, 2 and 3 coordinates."""

    length, shapes, markov = 2, ((3,), (2,), (1,)), False
    A = np.array([[0.7], [-1.2]])
    C = np.array([[0.5, 0.2], [-0.3, 0.8], [1.0, 0.1]])
    D = np.array([[0.4], [0.0], [-0.6]])

    def prior(self, condition=None):
        return Gaussian(torch.full((1, 1), 0.5, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64))

    def down(self, i, above, condition=None):
        a, c, d = map(torch.from_numpy, (self.A, self.C, self.D))
        if i == 1:
            return Gaussian(above[0] @ a.T + 1, torch.full((1, 2), 0.3, dtype=torch.float64))
        return Gaussian(above[0] @ c.T + above[1] @ d.T, torch.full((1, 3), 0.1, dtype=torch.float64))


class Nothing(Guide):
    length = 2

    def up(self, i, below, given):
        raise AssertionError("drawing from p does not ask q")


def test_draws_of_a_straight_ladder_have_the_moments_of_linear_algebra():
    """numpy; x is linear in the six numbers of its noise, so that 12 points +-sqrt(6) e_i have its exact moments."""
    chain = Chain(Nothing(), Straight())
    assert chain.model.noise_shape == (6,)
    points = math.sqrt(6) * torch.cat([torch.eye(6), -torch.eye(6)]).double()
    path = chain.generate(points)
    a, c, d = Straight.A, Straight.C, Straight.D
    pull = c @ a + d
    mean = pull[:, 0] * 0.5 + c @ np.ones(2)
    cov = 2.0 * pull @ pull.T + 0.3 * c @ c.T + 0.1 * np.eye(3)
    np.testing.assert_allclose(path.z[0].mean(0), mean, atol=1e-12)
    np.testing.assert_allclose(np.cov(path.z[0].numpy().T, bias=True), cov, atol=1e-12)
    np.testing.assert_allclose(path.z[1].mean(0), a[:, 0] * 0.5 + 1, atol=1e-12)
    held = chain.generate(points[:, 1:], top=torch.full((12, 1), 3.0).double())
    np.testing.assert_allclose(held.z[0].mean(0), pull[:, 0] * 3 + c @ np.ones(2), atol=1e-12)


# -- runs --------------------------------------------------------------------------------------------------------------

TINY = """
[data]
name = "digits"
[autoencoder]
kind = "vae"
latent = 8
layers = 2
width = 32
depth = 1
dropout = 0.1
[objective]
kind = "elbo"
warmup = 10
free_bits = 0.1
[training]
steps = 40
batch_size = 16
warmup = 5
ema = 0.9
checkpoint_every = 10
sample_every = 0
[evaluation]
draws = 2
examples = 50
samples = 30
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    (folder / "tiny.toml").write_text(TINY)
    words = ["training.steps=200", "training.sample_every=100", "training.learning_rate=0.003"]
    return train(recipes.read(folder / "tiny.toml", words), folder / "run")


def said(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def refused(capsys, *words):
    assert main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kuosan: ")
    return error


@pytest.mark.parametrize("overrides", [[], ["autoencoder.posterior=flow", "autoencoder.inference=bottom_up"]])
def test_an_interrupted_autoencoder_goes_on_as_if_nothing_had_been(tiny, tmp_path, overrides):
    """Truth: the uninterrupted run, bit for bit; the warm-up and dropout know their step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = recipes.read(tiny, overrides)
    train(recipe, whole)
    for until in (3, 17, 29):
        with pytest.raises(RuntimeError, match="stopped here"):
            train_with(recipe, parts, stop_at(until))
    train(recipe, parts)
    assert_same(end_of(whole), end_of(parts))
    assert losses(whole) == losses(parts)


def test_an_autoencoder_accumulating_in_parts_has_the_losses_of_the_whole_batch(tiny, tmp_path):
    """Truth: the batch at once; only the order of summation differs."""
    overrides = ["autoencoder.dropout=0.0"]
    train(recipes.read(tiny, overrides), tmp_path / "one")
    train(recipes.read(tiny, [*overrides, "training.accumulate=4"]), tmp_path / "four")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_training_lowers_what_the_digits_cost(run):
    """Of levels equally likely it would be log2(17) bits; trained a little, less."""
    assert isinstance(run, AutoencoderRun)
    assert run.step == 200
    bound = run.bound()
    assert len(bound.total) == 50
    assert bound.draws == 2
    assert 0.5 < bound.bits_per_dim().total < math.log2(17) - 0.5
    for step in (100, 200):
        assert (run.folder / "samples" / f"step-{step:08d}.png").is_file()


def test_a_sample_of_an_autoencoder_depends_on_its_seed_alone(run):
    """The same seeds in another order, another batch and other company; matrix products may round a level away."""
    many = run.sample(seeds=range(20))
    assert many.dtype == torch.uint8
    assert many.shape == (20, 1, 8, 8)
    assert int(many.max()) <= 16
    order = [7, 3, 19, 0]
    for other in (run.sample(seeds=order), run.sample(seeds=order, batch_size=1)):
        assert float((other != many[order]).double().mean()) < 0.01
    assert torch.equal(run.sample(20), many)
    assert len({tuple(one.flatten().tolist()) for one in many}) == 20


@pytest.mark.parametrize(("seeds", "words"), [([1, 1], "repeated: 1"), ([], "seed")])
def test_seeds_that_make_no_sense_are_refused_by_an_autoencoder_too(run, seeds, words):
    with pytest.raises(ValueError, match=words):
        run.sample(seeds=seeds)


def test_samples_of_an_autoencoder_are_pictures_like_any_others(run, capsys, tmp_path):
    result = said(capsys, "sample", run.folder, "-n", 3, "--out", tmp_path / "drawn")
    assert [one["seed"] for one in result["samples"]] == [0, 1, 2]
    assert result["solver"] == "layer by layer"
    assert (tmp_path / "drawn" / "sheet.png").is_file()
    assert all("class" not in one for one in result["samples"])


def test_the_report_of_an_autoencoder_shows_what_its_latents_do(run, capsys):
    """Sections of its own, in the numbers and on the page; two layers, of eight latents and four."""
    said(capsys, "report", run.folder)
    numbers = json.loads((run.folder / "report.json").read_text())
    page = (run.folder / "report.html").read_text()
    assert numbers["facts"]["kind"] == "An autoencoder"
    assert set(numbers["reconstructions"]["rmse"]) == {"all layers", "z2 alone"}
    assert all(0 < error < 1 for error in numbers["reconstructions"]["rmse"].values())
    assert [(one["layer"], one["size"]) for one in numbers["units"]["layers"]] == [(1, 8), (2, 4)]
    assert all(0 <= one["active"] <= one["size"] for one in numbers["units"]["layers"])
    active = sum(min(4, one["active"]) for one in numbers["units"]["layers"])
    assert numbers["traversals"]["rows"] == active > 0
    assert set(numbers["bits_per_dim"]) >= {"held_out", "train", "gap", "decoder"}
    for section in ("reconstructions", "units", "traversals", "samples", "neighbours"):
        assert f'id="{section}"' in page


@pytest.mark.parametrize("command", [["tune", "--steps", "3"], ["table"], ["compare"]])
def test_what_is_of_diffusion_models_is_refused_by_an_autoencoder(run, capsys, command):
    name, *rest = command
    assert "is the run of an autoencoder, which has no such thing" in refused(capsys, name, run.folder, *rest)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sample", "--class", "3"], "was trained without classes: none can be asked for"),
        (["sample", "--steps", "5"], "is an autoencoder, drawn from layer by layer: it has no steps"),
        (["sample", "--guidance", "1"], "it has no guidance"),
        (["sample", "--solver", "ddim"], "it has no solver"),
        (["sample", "--grid", "karras"], "it has no grid"),
        (["evaluate", "--guidance", "1"], "it has no guidance"),
        (["evaluate", "--variance", "beta"], "its chain has no variance to choose"),
        (["evaluate", "--bound-steps", "10"], "its chain has no steps to choose"),
        (["evaluate", "--trajectory"], "its chain has no on_trajectory to choose"),
        (["evaluate", "--ode"], "has no probability-flow ODE that is of its data"),
    ],
)
def test_settings_of_diffusion_models_are_refused_by_an_autoencoder(run, capsys, words, expected):
    command, *rest = words
    assert expected in refused(capsys, command, run.folder, *rest)


def test_labels_are_refused_by_an_autoencoder_from_python_too(run):
    with pytest.raises(RunError, match="trained without classes"):
        run.sample(2, labels=torch.tensor([1, 2]))


def test_a_diffusion_model_is_not_opened_as_an_autoencoder(tiny, tmp_path):
    text = TINY.replace('kind = "elbo"\nwarmup = 10\nfree_bits = 0.1', 'kind = "simple"').split("[autoencoder]")
    rest = text[1].split("[objective]")[1]
    network = '[process]\nkind = "cosine"\n[network]\nkind = "mlp"\nwidth = 8\ndepth = 1\n[objective]'
    (tmp_path / "other.toml").write_text(text[0] + network + rest)
    other = train(recipes.read(tmp_path / "other.toml", ["training.steps=2"]), tmp_path / "other")
    with pytest.raises(RunError, match="is the run of a diffusion model"):
        AutoencoderRun.open(other.folder)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["process.kind=cosine"], "process alone is given; .* needs both"),
        (["network.kind=mlp"], "network alone is given; .* needs both"),
        (["data.conditional=true"], "an autoencoder is not told classes or captions: set data.conditional = false"),
        (["training.compile=true"], "training.compile is for the network of a diffusion model"),
    ],
)
def test_a_recipe_of_two_minds_is_refused_when_it_is_read(tiny, overrides, words):
    with pytest.raises(RecipeError, match=words):
        recipes.read(tiny, overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["autoencoder.kind=gan"], "autoencoder.kind: must be one of vae, convolutional, diffusers, got 'gan'"),
        (["autoencoder.inference=sideways"], "autoencoder: inference must be one of bottom_up, top_down"),
        (["autoencoder.posterior=cauchy"], "autoencoder: posterior must be one of gaussian, flow"),
        (
            ["autoencoder.decoder=poisson"],
            "autoencoder: decoder must be one of levels, mixture, discretised, shared, gaussian",
        ),
        (["autoencoder.latent=7", "autoencoder.layers=4"], "4 of them from latent = 7 on cannot be"),
        (["autoencoder.layers=0"], "autoencoder: there is at least one layer"),
        (["autoencoder.layers=1.5"], "autoencoder: layers"),
        (["autoencoder.beta=2"], "autoencoder: beta: there is no such key"),
        (["autoencoder.levels=2"], "autoencoder: levels: there is no such key"),
        (["objective.kind=simple"], "objective.kind: of this kind of model must be elbo, latent, got 'simple'"),
        (["objective.free_bits=-1.0"], "objective: warmup and free_bits are never negative"),
    ],
)
def test_a_recipe_of_an_autoencoder_that_cannot_be_is_refused_before_training(tiny, tmp_path, overrides, words):
    with pytest.raises(RecipeError, match=words):
        train(recipes.read(tiny, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_diffusion_model_is_not_trained_on_the_bound_of_an_autoencoder():
    recipe = recipes.read("digits", ["objective.kind=elbo"])
    with pytest.raises(RecipeError, match=r"of this kind of model must be simple, .*, got 'elbo'"):
        build.make_objective(recipe)


def test_the_recipe_that_ships_is_a_vae_that_can_be_made():
    recipe = recipes.read("digits-vae")
    model = build.make_model(recipe, (1, 8, 8), 17, 10)
    assert isinstance(model, Autoencoder)
    assert model.length == 1
    assert build.make_objective(recipe) == Elbo(warmup=300)

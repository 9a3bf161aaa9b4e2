"""Networks: what goes in and comes out, and that every part of them learns."""

import math

import pytest
import torch

from kuosan.networks import MLP, NETWORKS, Transformer
from kuosan.networks.parts import Fourier

T = torch.tensor([0.2, 0.9])


@pytest.fixture(params=["mlp", "transformer", "transformer of pixels"])
def small(request):
    """A small network of each kind, as a function of its options; images of 1 x 4 x 4 unless said otherwise."""

    def make(shape=(1, 4, 4), **options):
        torch.manual_seed(0)
        if request.param == "mlp":
            return MLP(shape, width=16, depth=2, **options)
        patch = 2 if request.param == "transformer" else 1
        return Transformer(shape, patch=patch, width=16, depth=2, heads=2, channels=8, **options)

    return make


def awake(network):
    """The same network with no weight at zero, so that everything that it is told can be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 8)])
def test_one_output_has_the_shape_of_the_input(small, shape):
    assert small(shape)(torch.zeros(2, *shape), T).shape == (2, *shape)


@pytest.mark.parametrize("shape", [(3,), (2, 5)])
def test_an_mlp_takes_any_shape(shape):
    assert MLP(shape, width=16, depth=1)(torch.zeros(2, *shape), T).shape == (2, *shape)
    assert MLP(shape, width=16, depth=1, outputs=2)(torch.zeros(2, *shape), T).shape == (2, 2 * shape[0], *shape[1:])


def test_two_outputs_are_stacked_along_dimension_one(small):
    assert small((3, 4, 4), outputs=2)(torch.zeros(2, 3, 4, 4), T).shape == (2, 6, 4, 4)


def test_levels_are_one_more_dimension(small):
    network = small((3, 4, 4), outputs=17, stack_last=True)
    assert network(torch.zeros(2, 3, 4, 4), T).shape == (2, 3, 4, 4, 17)


def test_a_fresh_network_says_nothing(small):
    """Zero, whatever it is shown: the preconditioned denoiser starts as the best linear one."""
    assert small()(torch.randn(2, 1, 4, 4), T).abs().max() == 0


def test_class_minus_one_is_no_class(small):
    network, x = awake(small(classes=3)), torch.ones(2, 1, 4, 4)
    assert torch.equal(network(x, T, torch.tensor([-1, -1])), network(x, T, None))


def test_classes_and_times_are_told_apart(small):
    network, x = awake(small(classes=3)), torch.ones(4, 1, 4, 4)
    by_class = network(x, torch.full((4,), 0.5), torch.tensor([-1, 0, 1, 2]))
    by_time = network(x, torch.tensor([0.0, 0.001, 0.5, 1.0]), torch.tensor([0, 0, 0, 0]))
    for out in (by_class, by_time):
        assert min(float((out[i] - out[j]).abs().max()) for i in range(4) for j in range(i)) > 1e-5


def test_each_sample_is_answered_alone(small):
    network, x = awake(small(classes=3)), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    both = network(x, T, torch.tensor([0, 2]))
    for k, c in enumerate((0, 2)):
        assert torch.allclose(both[k], network(x[k : k + 1], T[k : k + 1], torch.tensor([c]))[0], atol=1e-6)


@pytest.mark.parametrize("classes", [0, 3])
def test_every_parameter_learns(small, classes):
    """Output and gates start at zero: the first step wakes the output, the second the gates, the third has it all."""
    network = small(classes=classes)
    generator = torch.Generator().manual_seed(3)
    x, wanted = (torch.randn(8, 1, 4, 4, generator=generator) for _ in range(2))
    condition = torch.tensor([-1, 0, 1, 2] * 2) if classes else None
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        ((network(x, torch.linspace(0, 1, 8), condition) - wanted) ** 2).mean().backward()
        optimiser.step()
    for name, parameter in network.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name
    if classes:
        assert bool((network.embedding.label.weight.grad.abs().amax(1) > 0).all())


def test_frequencies_are_not_part_of_a_checkpoint(small):
    assert not [name for name in small(classes=2).state_dict() if "frequencies" in name]


def test_recipes_know_the_networks_by_name():
    assert (NETWORKS["mlp"], NETWORKS["transformer"]) == (MLP, Transformer)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 16), (2, 3, 4, 4)])
def test_examples_of_another_shape_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"made for examples of shape \(1, 4, 4\), got"):
        small()(torch.zeros(shape), T)


@pytest.mark.parametrize("patch", [0, 3, 8])
def test_patches_that_do_not_divide_are_refused(patch):
    with pytest.raises(ValueError, match=rf"patch must be even or 1 and divide the image's 6 x 6 pixels, got {patch}"):
        Transformer((1, 6, 6), patch=patch, width=16, depth=1, heads=2, channels=8)


@pytest.mark.parametrize("classes", [[0, 3], [-2, 0]])
def test_a_class_that_does_not_exist_is_refused(small, classes):
    with pytest.raises(ValueError, match="classes are 0 to 2, or -1 for any; got"):
        small(classes=3)(torch.zeros(2, 1, 4, 4), T, torch.tensor(classes))


def test_a_network_without_classes_has_none_to_choose_from(small):
    with pytest.raises(ValueError, match="unconditional"):
        small()(torch.zeros(2, 1, 4, 4), T, torch.tensor([0, 0]))


@pytest.mark.parametrize("condition", [torch.tensor([0, 1, 2]), torch.tensor([[0], [1]]), torch.tensor([1])])
def test_there_is_one_class_for_each_sample(small, condition):
    with pytest.raises(ValueError, match="class"):
        small(classes=3)(torch.zeros(2, 1, 4, 4), T, condition)


def test_fourier_features_tell_neighbouring_bytes_apart(small):
    """Kingma et al. 2021, by hand: sin and cos of 2^n pi x for n = 7 and 8."""
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    angles = [2**7 * math.pi * x, 2**8 * math.pi * x]
    truth = torch.cat([x, *(wave(a) for a in angles for wave in (torch.sin, torch.cos))], 1)
    assert torch.allclose(Fourier(8)(x), truth, atol=1e-4)
    assert small(fourier=8)(x, T).shape == x.shape
    with pytest.raises(ValueError, match="fourier"):
        small(fourier=17)

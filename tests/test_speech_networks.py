"""Networks over frames and waves: how far each sees, what it is told, and how large the papers' sizes are."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from kuosan.build import make
from kuosan.networks.frames import Frames
from kuosan.networks.wave import WaveGrad, WaveNet, grouped

HOP, ROWS = 12, 5
KINDS = ["frames", "wavenet", "wavegrad"]


def small(kind, outputs=1):
    """A network of each kind, over frames of 4 rows or 12 samples, given a mel of 5 rows."""
    torch.manual_seed(0)
    if kind == "frames":
        return Frames((4, 8), width=16, depth=3, kernel=5, given=ROWS, outputs=outputs)
    if kind == "wavenet":
        return WaveNet((1, 4 * HOP), channels=8, depth=6, cycle=3, given=ROWS, hop=HOP, outputs=outputs)
    return WaveGrad((1, 4 * HOP), width=8, given=ROWS, hop=HOP, outputs=outputs)


def awake(network):
    """The same network with no weight at zero, in float64, so that all that it sees can be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.double().eval().requires_grad_(False)


def example(kind, frames, batch=2):
    """(x, t, condition) of so many frames, float64."""
    generator = torch.Generator().manual_seed(2)
    shape = (4, frames) if kind == "frames" else (1, frames * HOP)
    x, mel = (torch.randn(batch, *s, generator=generator).double() for s in (shape, (ROWS, frames)))
    return x, torch.linspace(0.2, 0.9, batch).double(), mel


def changed(network, x, t, mel, other_x, other_mel):
    """Where the output is another one, as the first and the last index along time."""
    difference = (network(x, t, mel) - network(other_x, t, other_mel)).abs().amax((0, 1))
    where = difference.nonzero().flatten()
    return int(where[0]), int(where[-1])


def bumped(x, k):
    """x with other values at index k of time."""
    x = x.clone()
    x[..., k] += 1
    return x


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_frames_will_do(kind, frames, outputs):
    x, t, mel = example(kind, frames)
    assert small(kind, outputs).double()(x, t, mel).shape == (2, outputs * x.shape[1], x.shape[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_network_says_nothing(kind):
    assert small(kind).double()(*example(kind, 4)).abs().max() == 0


def test_fresh_blocks_do_nothing():
    """Whatever is told and seen, before the gates have learned to open."""
    network = Frames((4, 8), width=16, depth=1)
    h = torch.randn(2, 8, 16)
    assert torch.equal(network.blocks[0](h, torch.randn(2, 16)), h)


@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize("depth", [1, 3])
def test_frames_see_as_far_as_their_kernels_reach(depth, kernel):
    """By hand: each block (kernel - 1) / 2 frames each way; the condition is seen 3 frames further than x."""
    network = awake(Frames((4, 8), width=16, depth=depth, kernel=kernel, given=ROWS))
    x, t, mel = example("frames", 41)
    reach = depth * (kernel - 1) // 2
    assert changed(network, x, t, mel, bumped(x, 20), mel) == (20 - reach, 20 + reach)
    assert changed(network, x, t, mel, x, bumped(mel, 20)) == (20 - reach - 3, 20 + reach + 3)


@pytest.mark.parametrize(("depth", "cycle", "reach"), [(1, 3, 1), (3, 3, 7), (6, 3, 14), (4, 2, 6), (3, 10, 7)])
def test_a_wavenet_sees_the_sum_of_its_dilations(depth, cycle, reach):
    """By hand: 1 + 2 + 4 + 1 + 2 + 4 = 14 samples each way of 6 layers in cycles of 3, and so on."""
    network = awake(WaveNet((1, HOP), channels=8, depth=depth, cycle=cycle, given=ROWS, hop=HOP))
    x, t, mel = example("wavenet", 8)
    assert changed(network, x, t, mel, bumped(x, 50), mel) == (50 - reach, 50 + reach)


def test_a_frame_of_a_mel_is_told_around_the_samples_that_belong_to_it():
    """By hand, hop 12 = 4 * 3: a frame reaches 2 of 4 into its neighbours at a rate of 4, and each of these samples
    2 of 3 at the wave's own rate, so 2 * 3 + 2 = 8 samples on each side; what the first layer heard goes through the
    second, of dilation 2."""
    network = awake(WaveNet((1, HOP), channels=8, depth=2, given=ROWS, hop=HOP))
    x, t, mel = example("wavenet", 8)
    assert changed(network, x, t, mel, x, bumped(mel, 4)) == (4 * HOP - 8 - 2, 5 * HOP - 1 + 8 + 2)


@pytest.mark.parametrize("hop", [2, 3, 7])  # primes: one step
def test_a_wavenet_starts_with_the_mel_interpolated(hop):
    """numpy.interp between the middles of frames, where there are frames on both sides."""
    (smooth,) = WaveNet((1, hop), channels=2, depth=1, given=2, hop=hop).frames
    mel = torch.rand(1, 1, 2, 6)
    middles = hop * np.arange(6) + (hop - 1) / 2
    samples = np.arange(math.ceil(middles[0]), math.floor(middles[-1]) + 1)
    found = smooth(mel)[0, 0]
    assert found.shape == (2, 6 * hop)
    for row in range(2):
        truth = np.interp(samples, middles, mel[0, 0, row].numpy())
        assert np.allclose(found[row, samples].detach().numpy(), truth, atol=1e-6)


def by_hand(layer, x):
    """A convolution of one example (C, N) in numpy, tap by tap."""
    weight, bias, d = layer.weight.numpy(), layer.bias.numpy(), layer.dilation[0]
    side, n = weight.shape[2] // 2 * d, x.shape[1]
    x = np.pad(x, ((0, 0), (side, side)))
    return bias[:, None] + sum(weight[:, :, k] @ x[:, k * d : k * d + n] for k in range(weight.shape[2]))


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def test_a_layer_of_a_wavenet_is_that_of_figure_2():
    """Kong et al. 2021, in numpy; and the skips are summed over the root of their number (section 3.1)."""
    network = awake(WaveNet((1, 8), channels=4, depth=3, given=3, hop=1, outputs=2))
    x, mel, t = torch.randn(1, 1, 8).double(), torch.randn(1, 3, 8).double(), torch.tensor([0.3]).double()
    told = network.embedding(t)[0].numpy()
    told = told / (1 + np.exp(-told))
    h, skips = np.maximum(by_hand(network.first, x[0].numpy()), 0), []
    for layer in network.layers:
        step = layer.step.weight.numpy() @ told + layer.step.bias.numpy()
        both = by_hand(layer.dilated, h + step[:, None]) + by_hand(layer.mel, mel[0].numpy())
        out = by_hand(layer.out, np.tanh(both[:4]) / (1 + np.exp(-both[4:])))
        h = (h + out[:4]) / 2**0.5
        skips.append(out[4:])
    truth = by_hand(network.last, np.maximum(by_hand(network.summed, sum(skips) / 3**0.5), 0))
    assert np.allclose(network(x, t, mel)[0].numpy(), truth, atol=1e-12)


def test_a_wavegrad_is_that_of_figures_3_to_5():
    """Chen et al. 2021, in numpy, with a hop of 6 = 3 * 2: one block down by 2, and two up."""
    network = awake(WaveGrad((1, 12), width=4, given=3, hop=6))
    x, mel, t = torch.randn(1, 1, 12).double(), torch.randn(1, 3, 2).double(), torch.tensor([0.3]).double()
    told = network.embedding(t)[0].numpy()
    told = told / (1 + np.exp(-told))
    full = by_hand(network.first, x[0].numpy())
    (down,) = network.down
    slow = inner = (full[:, ::2] + full[:, 1::2]) / 2
    for layer in down.main:
        inner = by_hand(layer, leaky(inner))
    slow = by_hand(down.beside, slow) + inner
    assert [layer.dilation[0] for layer in down.main] == [1, 2, 4]
    h = by_hand(network.mel, mel[0].numpy())
    for up, film, wave, factor in zip(network.up, reversed(network.films), (slow, full), (3, 2), strict=True):
        time = film.time.weight.numpy() @ told + film.time.bias.numpy()
        scale, shift = np.split(by_hand(film.second, leaky(by_hand(film.first, wave)) + time[:, None]), 2)
        raised = h.repeat(factor, 1)
        a, b, c, d = up.main
        inner = by_hand(b, leaky((1 + scale) * by_hand(a, leaky(raised)) + shift))
        middle = by_hand(up.beside, raised) + inner
        inner = by_hand(c, leaky((1 + scale) * middle + shift))
        h = middle + by_hand(d, leaky((1 + scale) * inner + shift))
        assert [layer.dilation[0] for layer in up.main] == [1, 2, 4, 8]
    assert np.allclose(network(x, t, mel)[0].numpy(), by_hand(network.last, h), atol=1e-12)


@pytest.mark.parametrize(("kind", "edge"), [("frames", 9), ("wavenet", 30), ("wavegrad", 250)])
def test_what_is_said_moves_with_what_is_seen(kind, edge):
    """A frame later, away from the ends: no frame has a place of its own."""
    network, (x, t, mel) = awake(small(kind)), example(kind, 60)
    each = x.shape[2] // mel.shape[2]
    before = network(x, t, mel)
    after = network(x.roll(each, 2), t, mel.roll(1, 2))
    assert torch.allclose(after[..., edge + each : -edge], before[..., edge : -edge - each], atol=1e-10)
    assert float(before.std()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_wave_the_time_and_the_mel_are_all_heard(kind):
    network, (x, t, mel) = awake(small(kind)), example(kind, 6)
    out = network(x, t, mel)
    for other in ((x + 0.1, t, mel), (x, t + 0.05, mel), (x, t, mel + 0.1)):
        assert float((network(*other) - out).abs().amax((1, 2)).min()) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_answered_alone(kind):
    network, (x, t, mel) = awake(small(kind)), example(kind, 6)
    both = network(x, t, mel)
    for k in range(2):
        assert torch.allclose(both[k], network(x[k : k + 1], t[k : k + 1], mel[k : k + 1])[0], atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    """Output and gates start at zero: the first step wakes the output, the second the gates, the third has it all."""
    network, (x, t, mel) = small(kind).double(), example(kind, 6)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        ((network(x, t, mel) - x.roll(1, 2)) ** 2).mean().backward()
        optimiser.step()
    for name, parameter in network.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_about_the_same_is_said(kind):
    network, (x, t, mel) = awake(small(kind)).float(), example(kind, 6)
    x, t, mel = x.float(), t.float(), mel.float()
    exact = network(x, t, mel)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t, mel).float()
    assert float((rough - exact).norm() / exact.norm()) < 0.03


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_frames_have_the_parameters_of_their_formula():
    """By hand for width w: embedding, first, condition, norm and last; in each block taps, W1, W2 and modulation."""
    w, c, m, depth = 16, 4, 5, 3
    block = (5 * w + w) + (w * 3 * w + 3 * w) + (3 * w * w + w) + (w * 3 * w + 3 * w)
    around = (64 * w + w) + (w * w + w) + (c * w + w) + (7 * m * w + w) + 2 * w + (w * c + c)
    assert count(small("frames")) == around + depth * block


def test_a_wavenet_is_as_large_as_diffwave():
    """Kong et al. 2021, section 5: the base model has 2.64 M parameters. By hand, of 64 channels and 30 layers:
    an embedding 64 -> 512 -> 512, two upsamplings of 3 x 32, 1 -> 64, the layers, 64 -> 64 and 64 -> 1."""
    layer = (512 * 64 + 64) + (3 * 64 * 128 + 128) + (80 * 128 + 128) + (64 * 128 + 128)
    around = (64 * 512 + 512) + (512 * 512 + 512) + 2 * (3 * 32 + 1) + 2 * 64 + (64 * 64 + 64) + (64 + 1)
    found = count(WaveNet((1, 256)))
    assert found == around + 30 * layer == 2_587_203
    assert found == pytest.approx(2.64e6, rel=0.025)


def test_a_wavegrad_is_as_large_as_its_paper_says():
    """Chen et al. 2021, table 1: the base model has 15 M parameters; ours 6 % more than exactly that, and they are
    those of the widths of figure 3 by hand: (32, 128, 128, 256, 512) down and (768, 512, 512, 256, 128, 128) up."""
    down, up = (32, 128, 128, 256, 512), (768, 512, 512, 256, 128, 128)

    def conv(a, b, taps=3):
        return taps * a * b + b

    downs = sum(conv(a, b, 1) + conv(a, b) + 2 * conv(b, b) for a, b in pairwise(down))
    ups = sum(conv(a, b, 1) + conv(a, b) + 3 * conv(b, b) for a, b in pairwise(up))
    films = sum(conv(a, a) + conv(a, 2 * b) for a, b in zip(down, up[:0:-1], strict=True))
    time = (64 * 128 + 128) + (128 * 128 + 128) + sum(128 * a + a for a in down)
    found = count(WaveGrad((1, 256)))
    assert found == conv(1, 32, 5) + downs + films + conv(80, 768) + ups + conv(128, 1) + time == 15_971_457
    assert found == pytest.approx(15e6, rel=0.07)
    assert count(WaveGrad((1, 256), width=32)) == 1_037_793


def test_a_hop_is_brought_up_in_few_steps():
    """300 in the steps of WaveGrad's paper, and 256 in two of DiffWave's."""
    assert grouped(300, 5) == [5, 5, 3, 2, 2]
    assert grouped(256, 5) == [4, 4, 4, 2, 2]
    assert grouped(256, 2) == [16, 16]
    assert (grouped(1, 5), grouped(7, 5)) == ([], [7])
    assert all(math.prod(grouped(hop, most)) == hop for hop in range(1, 400) for most in (2, 5))


@pytest.mark.parametrize("hop", [1, 2, 15, 49])
def test_any_hop_will_do(hop):
    networks = [WaveNet((1, hop), channels=4, depth=2, given=2, hop=hop)]
    networks += [WaveGrad((1, hop), width=4, given=2, hop=hop)] if hop > 1 else []
    for network in networks:
        assert network(torch.zeros(1, 1, 3 * hop), torch.zeros(1), torch.zeros(1, 2, 3)).shape == (1, 1, 3 * hop)


def test_recipes_can_make_them():
    """All that a recipe sets is a number; the rest comes from the data, and classes are not asked for."""
    kinds = {"frames": Frames, "wavenet": WaveNet, "wavegrad": WaveGrad}
    frames = make(kinds, {"kind": "frames", "width": 16}, "network", shape=(4, 8), given=ROWS, outputs=1, classes=0)
    assert isinstance(frames, Frames)
    for kind in ("wavenet", "wavegrad"):
        network = make(kinds, {"kind": kind}, "network", shape=(1, 24), given=ROWS, hop=HOP, outputs=1, classes=0)
        assert isinstance(network, kinds[kind])


def test_frames_without_a_condition_take_none():
    network = Frames((4, 8), width=16, depth=1)
    x, t, mel = (a.float() for a in example("frames", 6))
    assert network(x, t).shape == x.shape
    with pytest.raises(ValueError, match="unconditional"):
        network(x, t, mel)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mel: None, r"needs a condition of shape \(2, 5, 6\), got none"),
        (lambda mel: mel[:, :4], r"must have shape \(2, 5, 6\) .*, got \(2, 4, 6\)"),
        (lambda mel: mel[..., :5], r"must have shape \(2, 5, 6\) .*, got \(2, 5, 5\)"),
        (lambda mel: mel[:1], r"must have shape \(2, 5, 6\) .*, got \(1, 5, 6\)"),
        (lambda mel: mel.long(), "tensor of real numbers .*, got torch.int64"),
        (lambda mel: "a word", "tensor of real numbers .*, got str"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(kind, spoil, message):
    x, t, mel = example(kind, 6)
    with pytest.raises(ValueError, match=message):
        small(kind).double()(x, t, spoil(mel))


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 4), (2, 4, 0), (2, 1, 4, 6)])
def test_frames_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"made for \(4, T\) frames, got"):
        small("frames")(torch.zeros(shape), torch.zeros(2), torch.zeros(2, ROWS, 6))


@pytest.mark.parametrize("shape", [(2, 1, 71), (2, 2, 72), (2, 72), (2, 1, 0)])
@pytest.mark.parametrize("kind", ["wavenet", "wavegrad"])
def test_waves_of_no_whole_number_of_frames_are_refused(kind, shape):
    with pytest.raises(ValueError, match=r"made for waves \(1, N\), N a multiple of its hop of 12, got"):
        small(kind)(torch.zeros(shape), torch.zeros(2), torch.zeros(2, ROWS, 6))


@pytest.mark.parametrize(
    ("maker", "shape", "options", "message"),
    [
        (Frames, (4, 8), {"kernel": 4}, "kernel must be odd"),
        (Frames, (4, 8), {"width": 0}, "width"),
        (Frames, (4, 8), {"outputs": 0}, "outputs"),
        (Frames, (4, 8), {"expansion": 0}, "expansion"),
        (Frames, (4, 8), {"given": -1}, "given"),
        (Frames, (4,), {}, r"frames are \(C, T\)"),
        (WaveNet, (1, 300), {}, "multiple of the hop of 256"),
        (WaveNet, (2, 256), {}, r"waves are \(1, N\)"),
        (WaveNet, (1, 256), {"cycle": 0}, "cycle must lie in 1 to 20"),
        (WaveNet, (1, 256), {"given": 0}, "given"),
        (WaveNet, (1, 256), {"hop": 0}, "hop must lie"),
        (WaveGrad, (1, 300), {}, "multiple of the hop of 256"),
        (WaveGrad, (1, 256), {"width": 6}, "width must be a multiple of 4"),
        (WaveGrad, (1, 256), {"hop": 1}, "hop must be at least 2"),
        (WaveGrad, (1, 256), {"outputs": 0}, "outputs"),
    ],
)
def test_impossible_sizes_are_refused(maker, shape, options, message):
    with pytest.raises(ValueError, match=message):
        maker(shape, **options)

"""The judge of what captions say: its shares by hand, and that it learns, on made-up characters."""

import pytest
import torch

from kuosan.image.attributes import MOST_STROKES, AttributeJudge, Share, _Count, _value
from kuosan.image.characters import ATTRIBUTES, held_out_combinations
from kuosan.image.data import Examples, ImageData

RADICALS = ATTRIBUTES["radical"][:4]


def caption(radical, strokes, typeface, weight):
    return f"{radical} radical, {strokes} strokes, {typeface}, {weight}; nothing"


def made_up(n, seed):
    """Grey 16x16 pictures in which each attribute is a patch of its own, and their captions."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.stack([torch.randint(k, (n,), generator=generator) for k in (4, 10, 2, 2)], dim=1)
    levels = torch.randint(200, 256, (n, 1, 16, 16), generator=generator, dtype=torch.uint8)
    captions = []
    for image, (radical, strokes, typeface, weight) in zip(levels[:, 0], draws.tolist(), strict=True):
        image[:4, 4 * radical : 4 * radical + 4] = 0
        image[8 : 8 + (strokes + 1) // 2, :8] = 0
        image[8 : 8 + strokes // 2, 8:] = 0
        if typeface:
            image[5:7, :6] = 0
        if weight:
            image[5:7, 10:] = 0
        captions.append(
            caption(RADICALS[radical], strokes + 1, *(ATTRIBUTES["typeface"][typeface], ATTRIBUTES["weight"][weight]))
        )
    return Examples(levels, captions=tuple(captions))


def data(train=1200, held_out=200):
    parts = made_up(train, 1), made_up(held_out, 2)
    return ImageData("made up", *parts, level_count=256, classes=None, licence="", source="")


@pytest.mark.slow
def test_a_judge_learns_what_captions_say_and_is_kept(tmp_path):
    state = torch.random.get_rng_state()
    judge = AttributeJudge.train(data(), epochs=12)
    assert torch.equal(torch.random.get_rng_state(), state)
    found = judge.reference["attributes"]
    for name in ATTRIBUTES:
        assert found[name]["seen"]["right"] > 0.9, (name, found[name])
    judge.save(tmp_path / "judge")
    again, pictures = AttributeJudge.load(tmp_path / "judge"), made_up(20, 3).levels
    assert again.reference == judge.reference
    assert torch.equal(again.judged(pictures), judge.judged(pictures))
    with pytest.raises(ValueError, match=r"expects uint8 \(1, 16, 16\)"):
        judge.judged(pictures[:, :, :8])
    (tmp_path / "judge" / "attributes.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged: delete it"):
        AttributeJudge.load(tmp_path / "judge")


def test_shares_are_counted_apart_for_seen_and_unseen_combinations():
    """Truth: by hand. A judge that always says the first value of each attribute."""

    class First(AttributeJudge):
        def __init__(self):
            pass

        def judged(self, levels):
            return torch.zeros(len(levels), len(ATTRIBUTES), dtype=torch.int64)

    typeface, weight, strokes, radical = held_out_combinations()[0]
    count = {"up to 5": 5, "6 to 8": 7, "9 to 11": 10, "12 to 15": 13, "16 and more": 17}[strokes]
    held = caption(radical, count, typeface, weight)
    captions = [held, caption("one", 3, "sans", "regular"), caption("one", 3, "serif", "regular")]
    found = First().quality(torch.zeros(3, 1, 16, 16, dtype=torch.uint8), captions)
    assert found["samples"] == 3
    seen = found["attributes"]["typeface"]["seen"]
    assert (seen["right"], seen["images"]) == (0.5, 2)
    assert seen["error"] == pytest.approx((0.25 / 2) ** 0.5)
    assert found["attributes"]["typeface"]["unseen"]["right"] == float(typeface == "sans")
    assert found["attributes"]["strokes"]["seen"]["right"] == 1.0
    assert found["attributes"]["radical"]["seen"] is None  # "one" is none of the 20
    assert found["attributes"]["radical"]["unseen"]["images"] == 1
    assert Share.of(torch.zeros(0, dtype=torch.bool)) is None
    words = "\n".join(AttributeJudge.in_words(found | {"held_out": found}))
    assert "typeface, combinations seen" in words
    assert "50.0%" in words


def test_a_bucket_of_strokes_is_the_likeliest_sum_of_its_counts():
    """Truth: by hand: the likeliest count is 9, the likeliest bucket 6 to 8."""
    chances = torch.full((1, MOST_STROKES + 1), 1e-6)
    chances[0, 9], chances[0, 6], chances[0, 7], chances[0, 8] = 0.3, 0.2, 0.2, 0.2
    assert _value("strokes", chances).item() == 1
    for count, bucket in (
        (1, 0),
        (5, 0),
        (6, 1),
        (8, 1),
        (9, 2),
        (11, 2),
        (12, 3),
        (15, 3),
        (16, 4),
        (MOST_STROKES, 4),
    ):
        alone = torch.zeros(1, MOST_STROKES + 1)
        alone[0, count] = 1
        assert _value("strokes", alone).item() == bucket
    assert _value("weight", torch.tensor([[0.0, 1.0]])).item() == 1


def test_strokes_are_counted_by_place():
    """Truth: by hand: before training every image has ten; each place adds what it has."""
    head = _Count(channels=2, places=4)
    chances = head(torch.randn(3, 2, 2, 2)).softmax(1)
    assert chances.shape == (3, MOST_STROKES + 1)
    assert chances.argmax(1).tolist() == [10, 10, 10]
    with torch.no_grad():
        head.each.weight.copy_(torch.tensor([[1.0, 0.0]]))
        head.each.bias.zero_()
    features = torch.full((1, 2, 2, 2), -50.0)  # of which softplus leaves nothing
    features[0, 0, 0, 0], features[0, 0, 1, 1] = 3.0, 4.0
    assert head(features).argmax().item() == 7


def test_captions_that_say_nothing_to_check_are_refused():
    found = data(8, 4)
    mute = ImageData("mute", *(Examples(p.levels) for p in (found.train, found.held_out)), 256, None, "", "")
    with pytest.raises(ValueError, match="mute has no captions"):
        AttributeJudge.train(mute)
    vague = Examples(found.train.levels, captions=("a picture",) * 8)
    with pytest.raises(ValueError, match="do not say typeface"):
        AttributeJudge.train(ImageData("vague", vague, vague, 256, None, "", ""))

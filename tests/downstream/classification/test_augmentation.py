"""He et al.'s augmentation: what each operation may be used on, and what mixing does to pixels and targets."""

import numpy as np
import pytest
import torch

from hf_dbp.downstream.classification.augmentation import OPERATIONS, Mixing, erased, operations_for, rand_augment


def drawn(channels: int = 3, side: int = 24) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((channels, side, side + 4), dtype=np.float32))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_operation_that_is_offered_takes_such_images(channels):
    names, left_out = operations_for(channels, eight_bits=True)
    assert set(names) | left_out.keys() == OPERATIONS.keys()
    assert ("color" in left_out) == (channels != 3)
    image = drawn(channels)[None]
    for name in names:
        for level in (-0.9, 0.9):
            found = OPERATIONS[name](image, level)
            assert found.shape == image.shape and found.dtype == torch.float32, name
            assert not torch.equal(found, image), name


def test_colour_is_for_rgb_alone():
    with pytest.raises(Exception, match="shape"):
        OPERATIONS["color"](drawn(4)[None], 0.9)


def test_deep_images_lose_no_depth():
    names, left_out = operations_for(3, eight_bits=False)
    assert set(left_out) == {"equalize", "posterize"}
    image = drawn()
    for name in left_out:  # what they would do: 256 steps or fewer
        assert len(OPERATIONS[name](image[None], 0.5).unique()) <= 256
    rng = np.random.default_rng(0)
    for _ in range(20):
        rand_augment(image, names, rng, operations=2, magnitude=9.0)


def test_operations_do_what_their_names_say():
    image = drawn()[None]
    brighter, darker = (OPERATIONS["brightness"](image, level) for level in (0.5, -0.5))
    torch.testing.assert_close(brighter, (image * 1.45).clamp(max=1))
    torch.testing.assert_close(darker, image * 0.55)
    torch.testing.assert_close(OPERATIONS["invert"](image, 1.0), 1 - image)
    spot = torch.zeros(1, 1, 21, 21)
    spot[..., 10, 14] = 1.0  # right of the centre
    turned = OPERATIONS["rotate"](spot, 1.0)[0, 0]  # by 30 degrees, about the centre
    y, x = divmod(int(turned.argmax()), 21)
    assert (abs(y - 10), x - 10) == (2, 3)
    moved = OPERATIONS["translate_x"](spot, 3 / 0.45 / 21)[0, 0]
    assert abs(divmod(int(moved.argmax()), 21)[1] - 14) == 3
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "brightness", "contrast", "sharpness"):
        torch.testing.assert_close(OPERATIONS[name](image, 0.0), image, atol=1e-4, rtol=0)


def test_views_follow_from_their_generator_and_leave_pytorchs_alone():
    names, _ = operations_for(3, eight_bits=True)
    state = torch.random.get_rng_state()
    one, two = (
        [rand_augment(drawn(), names, rng, operations=2, magnitude=9.0) for _ in range(8)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert len({image.sum().item() for image in one}) > 4
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_quarter_of_the_views_is_erased_and_no_more_than_a_third_of_each():
    rng, image, shares = np.random.default_rng(0), torch.full((4, 32, 32), 7.0), []
    for _ in range(400):
        found = erased(image, rng, 0.25)
        changed = (found != 7.0).all(dim=0)
        shares.append(float(changed.float().mean()))
        assert torch.equal((found != 7.0).any(dim=0), changed)  # all channels of the same rectangle
    hit = [share for share in shares if share]
    assert 0.18 < len(hit) / 400 < 0.32
    assert min(hit) > 0.01 and max(hit) < 0.36
    assert torch.equal(image, torch.full((4, 32, 32), 7.0))


def test_targets_are_smoothed_by_hand():
    found = Mixing(4, smoothing=0.1).targets(torch.tensor([2]))
    torch.testing.assert_close(found, torch.tensor([[0.025, 0.025, 0.925, 0.025]]))
    weighted = Mixing(4, smoothing=0.1, weights=[1.0, 1.0, 3.0, 1.0]).targets(torch.tensor([2, 0]))
    torch.testing.assert_close(weighted.sum(dim=1), torch.tensor([3.0, 1.0]))


def test_mixing_changes_pixels_and_targets_by_one_share():
    """Constant images show the share in their mean: it is that of the targets."""
    pixels, labels = torch.arange(4.0)[:, None, None, None].expand(4, 2, 16, 20).clone(), torch.tensor([0, 1, 2, 3])
    before, kinds = pixels.clone(), set()
    for seed in range(40):
        mixed, targets = Mixing(4, smoothing=0.0)(pixels, labels, np.random.default_rng(seed))
        share = targets[0, 0].item()
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
        torch.testing.assert_close(targets[0, 3].item(), 1 - share, atol=1e-6, rtol=0)
        expected = before.mean(dim=(1, 2, 3)) * share + before.flip(0).mean(dim=(1, 2, 3)) * (1 - share)
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), expected, atol=1e-5, rtol=0)
        kinds.add("cutmix" if len(mixed[0].unique()) > 1 else "mixup")
    assert kinds == {"mixup", "cutmix"}
    assert torch.equal(pixels, before)


def test_without_mixing_pixels_stay():
    pixels, labels = torch.rand(2, 3, 8, 8), torch.tensor([1, 0])
    same, targets = Mixing(2, mixup=0.0, cutmix=0.0, smoothing=0.0)(pixels, labels, np.random.default_rng(0))
    assert same is pixels and targets.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    for only in ({"mixup": 0.0}, {"cutmix": 0.0}):
        mixed, _ = Mixing(2, **only)(pixels, labels, np.random.default_rng(1))
        outside = (mixed == pixels).all(dim=1)
        assert outside.any() == ("mixup" in only)

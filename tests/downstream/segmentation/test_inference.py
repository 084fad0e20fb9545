"""Whole images: padding and windows leave no trace where the model looks at single pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dbp.downstream.segmentation import inference, sliding
from hf_dbp.downstream.segmentation.data import LabelledImages
from hf_dbp.downstream.segmentation.inference import WholeImages, count_pixels, predict_labels, whole_image_logits
from hf_dbp.downstream.segmentation.sliding import window_origins


class PixelModel(nn.Module):
    """Logits of a pixel are a linear function of that pixel; refuses anything but full crops."""

    def __init__(self, crop_size):
        super().__init__()
        self.crop_size, self.linear, self.batches = crop_size, nn.Conv2d(3, 4, 1), []

    def forward(self, pixel_values):
        assert pixel_values.shape[2:] == (self.crop_size, self.crop_size)
        self.batches.append(len(pixel_values))
        return SimpleNamespace(logits=self.linear(pixel_values))


@pytest.mark.parametrize("size", [(16, 16), (7, 10), (40, 9), (33, 50), (17, 16), (100, 31)])
def test_windows_and_padding_give_the_logits_of_the_whole(size):
    model, image = PixelModel(16), torch.randn(3, *size)
    with torch.no_grad():
        logits = whole_image_logits(model, [image, image[:, :5, :5]], 16, batch_size=4, classes=4)
        torch.testing.assert_close(logits[0], model.linear(image))
        torch.testing.assert_close(logits[1], model.linear(image[:, :5, :5]))
    assert set(model.batches) == {4}  # the last one filled up: a window's logits depend on nothing else


def test_windows_overlap_by_a_third():
    model = PixelModel(30)
    with torch.no_grad():
        whole_image_logits(model, [torch.randn(3, 30, 90)], 30, batch_size=1, classes=4)
    assert len(model.batches) == 4  # at 0, 20, 40, 60


def labelled_set(sizes, classes=4):
    rng = np.random.default_rng(0)
    samples = [
        {"image": rng.integers(0, 256, (*size, 3), dtype=np.uint8), "annotation": rng.integers(0, classes, size)}
        for size in sizes
    ]
    samples[0]["annotation"][:2] = 255
    images = LabelledImages(samples, ("image", "annotation"), num_labels=classes, ignore_index=255)
    return samples, WholeImages(images, None, [0.5] * 3, [0.25] * 3)


def test_confusion_and_loss_count_every_labelled_pixel_once():
    samples, data = labelled_set([(20, 31), (16, 8), (40, 40)])
    model = PixelModel(16).eval()
    options = {"num_labels": 4, "ignore_index": 255, "crop_size": 16}
    found = count_pixels(model, [[data[0], None, data[1]], [data[2]]], **options)
    confusion, loss = found.confusion_KK, found.loss_sum
    assert list(found.images) == [0, 2, 3]  # None: an image that could not be read
    assert sum(image.true_K.sum() for image in found.images.values()) == confusion.sum()
    expected, expected_loss = np.zeros((4, 4), int), 0.0
    for sample in samples:
        pixels = torch.from_numpy((sample["image"] / 255 - 0.5) / 0.25).float().permute(2, 0, 1)
        target = torch.from_numpy(sample["annotation"])
        logits = model.linear(pixels).detach()
        expected_loss += nn.functional.cross_entropy(logits[None], target[None], ignore_index=255, reduction="sum")
        for true in range(4):
            for predicted in range(4):
                expected[true, predicted] += ((target == true) & (logits.argmax(0) == predicted)).sum().item()
        ids = predict_labels(model, data, sample["image"], 16)
        torch.testing.assert_close(ids, logits.argmax(0))
    np.testing.assert_array_equal(confusion, expected)
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)


def test_images_are_scaled_to_the_long_edge_and_predicted_at_label_resolution():
    samples, data = labelled_set([(40, 60)])
    scaled = WholeImages(data.images, 30, data.mean, data.std)
    assert scaled[0][0].shape == (3, 20, 30)
    assert predict_labels(PixelModel(16), scaled, samples[0]["image"], 16).shape == (40, 60)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation of this thread gives."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.found = max(self.found, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("stretch", [1, 2])
def test_evaluation_takes_no_more_for_higher_images(monkeypatch, stretch):
    """Class ids are taken band by band: no logits of a whole image, at its own size or scaled."""
    monkeypatch.setattr(sliding, "BAND", 2**13)
    model, taken = PixelModel(16), {}
    model.linear = nn.Conv2d(3, 40, 1)
    for height in (64, 640):
        pixels, label = torch.randn(3, height, 20), np.zeros((stretch * height, stretch * 20), np.int32)
        with Largest() as largest:
            found = count_pixels(
                model, [[(pixels, label)]], num_labels=40, ignore_index=255, crop_size=16, batch_size=2
            )
        assert found.confusion_KK.sum() == label.size
        taken[height] = largest.found
    assert taken[640] < 1.1 * taken[64] and taken[640] < 40 * label.size  # bytes; all logits are 160 a pixel


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31), classes=st.sampled_from([2, 3, 6, 256, 257]), height=st.integers(1, 12),
    width=st.integers(1, 12), part=st.integers(1, 300), spread=st.sampled_from([0.1, 3.0, 40.0]), ties=st.booleans(),
)  # fmt: skip
def test_the_likeliest_class_is_that_of_the_softmax(seed, classes, height, width, part, spread, ties):
    """Some rows at a time: ids (the first of equal ones), their probability, and the highest of any class but 0."""
    logits = torch.randn(classes, height, width, generator=torch.Generator().manual_seed(seed)) * spread
    logits = logits.round() if ties else logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "PART", part)
        found = list(inference.likely(logits))
    softmax = logits.double().softmax(dim=0)
    tops = [each.top for each in found]
    assert tops == np.cumsum([0, *(len(each.ids_nW) for each in found[:-1])]).tolist()
    assert max(each.ids_nW.numel() for each in found) <= max(part // classes, width)
    assert torch.cat([each.ids_nW for each in found]).tolist() == logits.numpy().argmax(axis=0).tolist()
    chance = torch.cat([each.chance_nW for each in found]).double()
    torch.testing.assert_close(chance, softmax.max(dim=0).values, rtol=1e-5, atol=1e-6)
    highest = max(each.foreground for each in found)
    assert highest == pytest.approx(float(softmax[1:].sum(dim=0).max()), abs=1e-6)


def test_on_a_cpu_a_forward_pass_has_few_pixels_and_one_thread_beside_it(monkeypatch):
    """Else memory grows with the batch and the crop, and threads of the blending take the cores of the model."""
    monkeypatch.setattr(sliding, "PIXELS", 3 * 16**2)
    image, threads = torch.randn(3, 40, 40), torch.get_num_threads()
    model, small = PixelModel(16), PixelModel(16)
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            bands = sliding.logit_bands(model, [sliding.WholeView(image, (40, 40))], 16, batch_size=8, classes=4)
            beside = [(torch.get_num_threads(), band)[0] for band in bands]
            whole_image_logits(small, [image], 16, batch_size=2, classes=4)
        assert set(beside) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(model.batches) == {3} and set(small.batches) == {2}


@pytest.mark.parametrize("size", [(16, 16), (7, 10), (40, 9), (33, 50), (17, 16), (100, 31), (60, 100)])
def test_columns_handed_out_one_by_one_are_those_of_the_whole(size, monkeypatch):
    """Of a large image: the same logits to the bit, each pixel once, while only the overlap of the rows is kept."""
    model, image = PixelModel(16), torch.randn(3, *size)
    view = sliding.WholeView(image, size)
    kept, seen = [], torch.zeros(size)
    made = sliding.Columns.__init__

    def noted(self, *args):
        made(self, *args)
        kept.append(self.kept_Knw.shape[1])

    monkeypatch.setattr(sliding.Columns, "__init__", noted)
    with torch.no_grad():
        (whole,) = whole_image_logits(model, [image], 16, batch_size=4, classes=4)
        assert not kept
        monkeypatch.setattr(sliding, "LARGE", 0)
        (columns,) = whole_image_logits(model, [image], 16, batch_size=4, classes=4)
        bands = list(sliding.logit_bands(model, [view, view], 16, batch_size=4, classes=4))
    assert torch.equal(columns, whole)
    assert [band.last for band in bands if band.number == 0] == [*[False] * (len(bands) // 2 - 1), True]
    for band in bands:
        seen[band.top : band.top + band.logits_KnW.shape[1], band.left : band.left + band.logits_KnW.shape[2]] += 1
    assert (seen == 2).all()
    assert max(kept) <= (0 if size[0] <= 16 else 16 - min(np.diff(sliding.window_origins(size[0], 16))))


def test_a_large_image_is_counted_in_columns(monkeypatch):
    """Confusion and ids as of the whole."""
    _, data = labelled_set([(40, 70), (33, 50)])
    model = PixelModel(16).eval()
    options = {"num_labels": 4, "ignore_index": 255, "crop_size": 16}
    whole = count_pixels(model, [[data[0], data[1]]], **options)
    ids = predict_labels(model, data, data.images[1][0], 16)
    monkeypatch.setattr(sliding, "LARGE", 0)
    found = count_pixels(model, [[data[0], data[1]]], **options)
    assert np.array_equal(found.confusion_KK, whole.confusion_KK) and found.loss_sum == pytest.approx(whole.loss_sum)
    assert [found.images[k].foreground for k in (0, 1)] == [whole.images[k].foreground for k in (0, 1)]
    assert torch.equal(predict_labels(model, data, data.images[1][0], 16), ids)


class CoarseModel(PixelModel):
    """Leaves resizing to the user, as SegFormer does."""

    def forward(self, pixel_values):
        return SimpleNamespace(logits=nn.functional.avg_pool2d(super().forward(pixel_values).logits, 4))


@settings(deadline=None, max_examples=20)
@given(
    height=st.integers(1, 90), width=st.integers(1, 130), held=st.integers(1, 4000), coarse=st.booleans(),
    piece=st.integers(1, 3000),
)  # fmt: skip
def test_strips_give_the_logits_of_the_whole_and_hold_no_more_than_they_may(height, width, held, coarse, piece):
    """Of a large image: to the bit, each pixel once; what is held is bounded, however wide and high the image is."""
    torch.manual_seed(0)
    model, image, taken = (CoarseModel if coarse else PixelModel)(16), torch.randn(3, height, width), []
    view, seen = sliding.WholeView(image, (height, width)), torch.zeros(height, width)
    made = sliding.Columns.__init__

    def noted(self, *args):
        made(self, *args)
        taken.append((self.kept_Knw.numel(), self.sums_KSS.numel(), len(self.strip.lefts)))

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        (whole,) = whole_image_logits(model, [image], 16, batch_size=3, classes=4)
        patch.setattr(sliding.Columns, "__init__", noted)
        for name, value in {"LARGE": 0, "HELD": held, "PART": piece, "BAND": 0 if coarse else 2**24}.items():
            patch.setattr(sliding, name, value)
        bands = list(sliding.logit_bands(model, [view], 16, batch_size=3, classes=4))
    for band in bands:
        _, rows, columns = band.logits_KnW.shape
        part = slice(band.top, band.top + rows), slice(band.left, band.left + columns)
        assert torch.equal(band.logits_KnW, whole[:, part[0], part[1]])
        assert band.logits_KnW.numel() <= max(piece, 4 * columns)  # so many, or one row
        seen[part] += 1
    assert (seen == 1).all() and [band.last for band in bands] == [*[False] * (len(bands) - 1), True]
    for kept, sums, windows in taken:  # two windows and their neighbour are the least that a strip can have
        assert sums == 4 * 16 * 16 and (kept <= held or windows <= 3)


def test_an_image_of_any_size_holds_a_strip_of_150_classes():
    """20,000 or 200,000 pixels wide: never more logits than `HELD`, and at most a third of the windows twice."""
    for side in (20_000, 200_000):
        view = SimpleNamespace(size=(side, side), target=(side, side))
        strips = sliding._strips(view, 512, 150)
        overlap = sliding._overlap(window_origins(side, 512), 512)
        spans = [strip.lefts[-1] + 512 - strip.lefts[0] for strip in strips]
        assert max(150 * overlap * span for span in spans) <= sliding.HELD
        assert [strip.start for strip in strips] == [0, *(strip.end for strip in strips[:-1])]
        assert strips[-1].end == side
        assert sum(len(strip.lefts) for strip in strips) <= 1.34 * len(window_origins(side, 512)) + 1
        assert (len(sliding._strips(view, 512, 11)) == 1) is (side == 20_000)

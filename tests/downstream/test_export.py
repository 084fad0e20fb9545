"""ONNX equals PyTorch and needs nothing but the files that are written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

import hf_dbp
from hf_dbp.cli import main
from hf_dbp.data.augmentation import center_box, resized
from hf_dbp.data.images import ImageSource
from hf_dbp.data.one_split import open_images
from hf_dbp.data.values import pixel_values
from hf_dbp.downstream import export, onnx_run
from hf_dbp.downstream.features import FrozenEncoder, pooled
from hf_dbp.downstream.segmentation.data import LabelledImages
from hf_dbp.downstream.segmentation.inference import WholeImages, predict_labels
from hf_dbp.downstream.segmentation.sliding import window_origins
from hf_dbp.downstream.segmentation.upernet import build_upernet, load_upernet

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["torch"] = sys.modules["hf_dbp"] = sys.modules["transformers"] = None  # importing them fails
import numpy, run
model = run.Model(sys.argv[1])
image = run.read(sys.argv[2], len(model.how["mean"]))
numpy.save(sys.argv[3], model.feature(image) if model.how["kind"] == "encoder" else model.segment(image))
"""


@pytest.fixture
def folder(tmp_path):
    """Pictures of two sizes, a ViT and a UperNet over it."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for index, size in enumerate([(70, 50), (40, 60), (48, 48)]):
        Image.fromarray(rng.integers(0, 255, (6, 5, 3), dtype=np.uint8)).resize(size).save(
            tmp_path / "images" / f"{index}.png"
        )
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    vit = ViTModel(config, add_pooling_layer=False)
    torch.nn.init.normal_(vit.embeddings.position_embeddings)
    vit.save_pretrained(tmp_path / "vit")
    upernet = build_upernet(vit, {0: "a", 1: "b", 2: "c"}, hidden_size=8, auxiliary_channels=8)
    torch.nn.init.normal_(upernet.decode_head.classifier.weight)  # or all logits would be near 0
    upernet.save_pretrained(tmp_path / "upernet")
    for name in ("vit", "upernet"):
        statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(statistics))
    return tmp_path


def alone(folder, image):
    """What a process without PyTorch, transformers and hf_dbp makes of an image."""
    command = [sys.executable, "-c", ALONE, str(folder / "onnx"), str(image), str(folder / "out.npy")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return np.load(folder / "out.npy")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_encoder_is_equal_at_two_sizes_and_batches_and_runs_alone(folder, capsys):
    main(["export", str(folder / "vit"), str(folder / "images"), "--output_dir", str(folder / "onnx")])
    record = json.loads((folder / "onnx" / "export.json").read_text())
    shapes = {tuple(check["shape"]) for check in record["checks"] if "shape" in check}
    assert shapes == {(1, 3, 32, 32), (3, 3, 32, 32), (1, 3, 48, 40), (3, 3, 48, 40)}
    assert max(check["largest_difference"] for check in record["checks"]) < 1e-4
    assert "latency     one image: PyTorch" in capsys.readouterr().out
    vit = ViTModel.from_pretrained(folder / "vit", add_pooling_layer=False).eval()
    session = onnx_run.Model(folder / "onnx")
    pixels = torch.randn(2, 3, 24, 64)  # a shape that the check did not see
    with torch.no_grad():
        tokens = vit(pixels, interpolate_pos_encoding=True).last_hidden_state
    np.testing.assert_allclose(session.run(pixels.numpy()), tokens.numpy(), atol=1e-4)
    image = np.asarray(Image.open(folder / "images" / "0.png"))
    view = resized(image, (32, 32), center_box(image.shape[:2], (32, 32)))
    own = torch.from_numpy((view / 255 - [0.5, 0.4, 0.3]) / [0.3, 0.2, 0.1]).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        feature = vit(own).last_hidden_state[0, 1:].mean(dim=0)
    np.testing.assert_allclose(alone(folder, folder / "images" / "0.png"), feature.numpy(), atol=1e-4)


PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs at {PHOTOGRAPHS}")


@pytest.mark.slow
@real
@pytest.mark.filterwarnings("ignore")
def test_an_encoder_is_equal_on_photographs(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=96
    )
    vit = ViTModel(config, add_pooling_layer=False).eval()
    torch.nn.init.normal_(vit.embeddings.position_embeddings)
    vit.save_pretrained(tmp_path / "vit")
    statistics = {"image_mean": [0.5, 0.5, 0.4], "image_std": [0.3, 0.2, 0.3]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(statistics))
    source = open_images(ImageSource(train_dir=str(PHOTOGRAPHS / "imagenet_samples")))
    record = export.export_model(str(tmp_path / "vit"), source, tmp_path / "onnx")
    shapes = {tuple(check["shape"]) for check in record["checks"] if "shape" in check}
    assert shapes == {(1, 3, 96, 96), (4, 3, 96, 96), (1, 3, 128, 112), (4, 3, 128, 112)}
    assert max(check["largest_difference"] for check in record["checks"]) < 1e-4
    Image.fromarray(source[5]).save(tmp_path / "5.png")
    encoder = FrozenEncoder(vit, "vit", statistics["image_mean"], statistics["image_std"])
    with torch.no_grad():
        tokens = vit(encoder.squares(source)[5][None]).last_hidden_state
    np.testing.assert_allclose(alone(tmp_path, tmp_path / "5.png"), pooled(tokens, "mean")[0].numpy(), atol=1e-4)


@pytest.mark.slow
@real
@pytest.mark.filterwarnings("ignore")
def test_a_trained_segmenter_is_equal_on_photographs_with_the_settings_of_its_evaluation(tmp_path):
    flags = ["--train_dir", str(PHOTOGRAPHS / "camvid"), "--num_labels", "11", "--ignore_index", "11"]
    flags += ["--max_train_samples", "4", "--max_eval_samples", "2", "--crop_size", "64", "--long_edge", "160"]
    flags += ["--model_size", "mini", "--head_size", "16", "--auxiliary_head_size", "8", "--do_train", "--use_cpu"]
    flags += ["--per_device_train_batch_size", "2", "--max_steps", "3", "--report_to", "none", "--disable_tqdm", "1"]
    main(["finetune", *flags, "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false",
          "--output_dir", str(tmp_path / "upernet")])  # fmt: skip
    source = open_images(ImageSource(train_dir=str(PHOTOGRAPHS / "camvid")), "validation")
    record = export.export_model(str(tmp_path / "upernet"), source, tmp_path / "onnx")
    assert {tuple(c["shape"]) for c in record["checks"] if "shape" in c} == {(1, 3, 64, 64), (4, 3, 64, 64)}
    assert {tuple(c["whole_image"]) for c in record["checks"] if "whole_image" in c} == {(360, 480), (240, 480)}
    assert max(check["largest_difference"] for check in record["checks"]) < 1e-4
    (tmp_path / "images").mkdir()
    Image.fromarray(source[7]).save(tmp_path / "images" / "7.png")
    hf_dbp.predict(str(tmp_path / "upernet"), tmp_path / "images", tmp_path / "predicted", no_overlays=True)
    with Image.open(tmp_path / "predicted" / "masks" / "7.png") as mask:
        expected = np.asarray(mask)
    assert (alone(tmp_path, tmp_path / "images" / "7.png") == expected).mean() > 0.999


def unseen(value_range=(0.0, 1.0)):
    images = LabelledImages([], ("image", "annotation"), num_labels=3, ignore_index=255)
    images.value_range = value_range
    return images


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_segmenter_labels_whole_images_as_evaluation_does_and_runs_alone(folder):
    flags = ["--crop_size", "32", "--long_edge", "56", "--output_dir", str(folder / "onnx")]
    main(["export", str(folder / "upernet"), str(folder / "images"), *flags])
    record = json.loads((folder / "onnx" / "export.json").read_text())
    assert {tuple(c["shape"]) for c in record["checks"] if "shape" in c} == {(1, 3, 32, 32), (3, 3, 32, 32)}
    assert len({tuple(c["whole_image"]) for c in record["checks"] if "whole_image" in c}) == 4
    assert max(check["largest_difference"] for check in record["checks"]) < 1e-4
    model = load_upernet(str(folder / "upernet"), {0: "a", 1: "b", 2: "c"}).eval()
    data = WholeImages(unseen(), 56, [0.5, 0.4, 0.3], [0.3, 0.2, 0.1])
    image = np.asarray(Image.open(folder / "images" / "0.png"))
    expected = predict_labels(model, data, image, 32).numpy()
    given = alone(folder, folder / "images" / "0.png")
    assert given.shape == image.shape[:2]
    assert (given == expected).mean() > 0.999  # of pixels at which two classes are level, rounding decides
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize(
    ("dtype", "channels"), [("uint8", 3), ("uint8", 2), ("uint16", 1), ("float32", 5), ("int16", 1)]
)
@pytest.mark.parametrize("long_edge", [None, 20, 90])
def test_preprocessing_is_that_of_evaluation_for_any_depth(dtype, channels, long_edge):
    rng = np.random.default_rng(0)
    image = (rng.random((37, 53, channels)) * {"uint8": 255, "uint16": 65535, "int16": 999}.get(dtype, 1)).astype(dtype)
    value_range = (-200.0, 999.0) if dtype == "int16" else (0.0, 1.0)
    image = pixel_values(image)
    mean, std = [0.4] * channels, [0.2] * channels
    model = onnx_run.Model.__new__(onnx_run.Model)
    model.how = {"kind": "segmenter", "long_edge": long_edge, "mean": mean, "std": std, "value_range": value_range}
    expected = WholeImages(unseen(value_range), long_edge, mean, std).pixels(image).numpy()
    np.testing.assert_allclose(model.pixels(image), expected, atol=1e-4)


@pytest.mark.parametrize("size", [(20, 31), (5, 7), (11, 13)])
def test_scaling_of_logits_is_pytorchs(size):
    logits = torch.randn(3, 11, 13)
    expected = torch.nn.functional.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(onnx_run.bilinear(logits.numpy(), size), expected.numpy(), atol=1e-5)


def test_windows_are_those_of_evaluation():
    for length in range(32, 200):
        assert onnx_run.origins(length, 32) == window_origins(length, 32)


def test_a_model_that_differs_is_refused(folder, monkeypatch, capsys):
    class Wrong:
        def __init__(self, folder, threads):
            pass

        def pixels(self, image):
            return np.zeros((3, 32, 32), np.float32)

        def run(self, pixels):
            return np.zeros((len(pixels), 1 + pixels.shape[2] // 8 * pixels.shape[3] // 8, 16), np.float32)

    monkeypatch.setattr(export, "write_onnx", lambda *_: None)
    monkeypatch.setattr(onnx_run, "Model", Wrong)
    with pytest.raises(SystemExit):
        main(["export", str(folder / "vit"), str(folder / "images"), "--output_dir", str(folder / "onnx")])
    assert "differs from PyTorch by" in capsys.readouterr().err


def test_without_the_packages_it_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit):
        main(["export", str(folder / "vit"), str(folder / "images"), "--output_dir", str(folder / "onnx")])
    assert "ONNX needs the package onnxscript: pip install 'hf-dbp[onnx]'" in capsys.readouterr().err

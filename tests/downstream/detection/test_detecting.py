"""From flags to a folder that stock transformers loads, resumed to the bit, on any channels and depths."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_images import FLAGS, NAMES, object_folder
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from hf_dbp.downstream.detection import finetuning
from hf_dbp.downstream.detection.finetuning import main
from hf_dbp.downstream.detection.model import build_detector
from hf_dbp.downstream.detection.trainer import DetectionTrainer, one_group
from hf_dbp.downstream.detection.views import TrainingViews

ROOT = Path(__file__).parents[3]

# what a user types who has the folder alone
STOCK = """
import sys; sys.modules["hf_dbp"] = None
import json
from PIL import Image
import torch
from transformers import AutoImageProcessor, RfDetrForInstanceSegmentation, RfDetrForObjectDetection

folder, file = sys.argv[1:]
name = json.load(open(f"{folder}/config.json"))["architectures"][0]
model = {"RfDetrForObjectDetection": RfDetrForObjectDetection}.get(name, RfDetrForInstanceSegmentation)
model = model.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)
image = Image.open(file)
with torch.no_grad():
    output = model(**processor(image, return_tensors="pt"))
sizes = [(image.height, image.width)]
found = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)[0]
print(json.dumps({"module": type(model).__module__, "names": model.config.id2label,
                  **{key: value.tolist() for key, value in found.items()}}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return object_folder(tmp_path_factory.mktemp("objects"))


def given(folder: Path, output: Path, *flags: str, labels: str = "labels.json") -> list[str]:
    return [str(folder / "images"), str(folder / labels), *FLAGS, "--output_dir", str(output), *flags]


@pytest.fixture(scope="module")
def run(folder: Path, blank_pictures: list[None]) -> tuple[Path, dict[str, Any]]:
    """A short run with masks and real pictures: its folder and its record."""
    blank_pictures.append(None)
    record = main(given(folder, folder / "run", "--instances"))
    blank_pictures.pop()
    return folder / "run", record


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_a_run_records_what_it_did(run: tuple[Path, dict[str, Any]]) -> None:
    folder, record = run
    saved = json.loads((folder / "eval.json").read_text())
    assert saved == json.loads(json.dumps(record))
    assert record["task"] == "detection" and record["map"] == max(row["eval_map"] for row in record["evaluations"])
    assert record["data"]["objects"]["train"] == {"block": 8, "stripe": 4}
    assert record["data"]["objects"]["validation"] == {"block": 3, "stripe": 1}
    assert list(record["per_class"]) == list(NAMES)
    assert record["per_class"]["block"].keys() >= {"ap", "ap_50", "recall", "objects", "mask_ap"}
    assert record["map_large"] is None and record["mask_map"] is not None
    assert record["data"]["boxes"]["validation"] == {"tiny": 0} and record["data"]["size"] == [32, 32]
    assert record["train_seconds"] > 0 and "co2e_kg" in record
    for picture in ("predictions.png", "curves.png"):
        with Image.open(folder / picture) as figure:
            assert min(figure.size) > 200
    card = (folder / "README.md").read_text()
    for part in ("pipeline_tag: image-segmentation", "RfDetrForInstanceSegmentation.from_pretrained", "| stripe |",
                 "](predictions.png)", "emissions:", "AP of masks", "mean_average_precision"):  # fmt: skip
        assert part in card, part


@pytest.mark.slow
def test_it_finds_what_is_there(tmp_path: Path) -> None:
    """A few hundred steps from random weights suffice for bright rectangles."""
    long = ("--max_steps", "400", "--eval_steps", "100", "--decoder_width", "64")
    record = main(given(object_folder(tmp_path / "data", count=16), tmp_path / "run", *long, "--instances"))
    assert record["map_50"] > 0.5 and record["mask_map_50"] > 0.5


@pytest.mark.slow
def test_a_process_without_hf_dbp_loads_it_and_finds_the_same(run: tuple[Path, dict[str, Any]], folder: Path) -> None:
    file = folder / "images" / "validation" / "1.png"
    command = [sys.executable, "-c", STOCK, str(run[0]), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stock = json.loads(done.stdout.splitlines()[-1])
    assert stock["module"].startswith("transformers.models.rf_detr") and list(stock["names"].values()) == list(NAMES)
    alone = [flag for flag in given(folder, folder / "stock") if flag != "--do_train"]
    place = alone.index("--model_size")
    finder: list[Any] = []
    judge = DetectionTrainer.judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionTrainer, "judge", lambda *args: (finder.append(args[0]), judge(*args)))
        main([*alone[:place], *alone[place + 2 :], "--do_eval", "--model_name_or_path", str(run[0])])
    ours = finder[0].found[1]
    assert len(ours) == len(stock["scores"]) == 16  # eight queries of two classes
    np.testing.assert_allclose(ours.scores_M, stock["scores"], atol=2e-3)  # two resizings of eight bits
    assert set(ours.classes_M.tolist()) == set(stock["labels"])


def test_stopped_and_started_again_it_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    """Views, dropout, the points at which masks are compared and the optimizer resume where they were."""
    flags = ("--lr_scheduler_type", "constant", "--load_best_model_at_end", "false", "--instances")
    whole = main(given(folder, tmp_path / "whole", *flags))
    main(given(folder, tmp_path / "parts", *flags, "--max_steps", "2"))
    again = main(given(folder, tmp_path / "parts", *flags))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    curves = [{row["step"]: row["eval_loss"] for row in record["evaluations"]} for record in (whole, again)]
    assert list(curves[0]) == [2, 4] and curves[0] == curves[1]


def test_the_loss_of_evaluation_matches_all_queries_at_once() -> None:
    """The stock loss would split them into the groups of training, which the model does not have in evaluation."""
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    how: dict[str, Any] = {"image_size": (32, 32), "num_queries": 8, "decoder_layers": 1, "decoder_width": 32}
    vit = ViTModel(config, add_pooling_layer=False)
    torch.manual_seed(0)
    many = build_detector(vit, NAMES, query_groups=4, **how).eval()
    single = build_detector(vit, NAMES, query_groups=1, **how).eval()
    state = many.state_dict()
    own = {
        name: state[name][: len(value)] if value.ndim else state[name] for name, value in single.state_dict().items()
    }
    single.load_state_dict(own)
    box = torch.tensor([[0.4, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.2]])
    inputs = {
        "pixel_values": torch.randn(1, 3, 32, 32),
        "labels": [{"class_labels": torch.tensor([0, 1]), "boxes": box}],
    }
    with torch.no_grad():
        expected = single(**inputs).loss
        with one_group(many):
            assert many(**inputs).loss == pytest.approx(float(expected), rel=1e-5)
        assert many.config.group_detr == 4
        assert many(**inputs).loss != pytest.approx(float(expected), rel=1e-3)


def without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    build = finetuning.build_detector

    def built(*args: Any, **how: Any) -> Any:
        model = build(*args, **how)
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        return model

    monkeypatch.setattr(finetuning, "build_detector", built)


def test_two_micro_batches_are_one_batch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although one of them may hold more objects than the other."""
    without_dropout(monkeypatch)
    flags = ("--max_steps", "2", "--optim", "sgd", "--learning_rate", "0.05", "--lr_scheduler_type", "constant",
             "--warmup_steps", "0")  # fmt: skip
    main(given(folder, tmp_path / "one", *flags))
    main(
        given(
            folder, tmp_path / "two", *flags, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"
        )
    )
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("channels", "depth"), [(4, np.uint8), (1, np.uint16), (2, np.float32)])
def test_other_channels_and_depths(channels: int, depth: type, tmp_path: Path) -> None:
    folder = object_folder(tmp_path / "data", count=4, channels=channels, depth=depth)
    record = main(given(folder, tmp_path / "run", "--max_steps", "2", "--instances"))
    assert record["data"]["channels"] == channels and np.isfinite(record["loss"])
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("pipeline_tag" in card) is False


@pytest.mark.parametrize("masks", [(), ("--instances",)])
def test_batches_of_images_without_objects(folder: Path, tmp_path: Path, masks: tuple[str, ...]) -> None:
    """Of eight images, half show a stripe: with batches of one, steps and evaluations without an object occur."""
    flags = ("--classes", "stripe", "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1")
    record = main(given(folder, tmp_path, *flags, *masks, "--max_steps", "8"))
    assert record["guards"]["skipped_steps"] == 0 and np.isfinite(record["loss"]) and len(record["evaluations"]) == 4


def test_masks_yolo_and_the_built_in_images(folder: Path, tmp_path: Path) -> None:
    names = ("--id2label", str(folder / "names.json"), "--instances", "--classes", "stripe", "--max_steps", "2")
    record = main(given(folder, tmp_path / "masks", *names, labels="masks"))
    assert record["data"]["objects"]["train"] == {"stripe": 4}
    record = main(given(folder, tmp_path / "yolo", "--max_steps", "2", labels="yolo"))
    assert "mask_map" not in record and record["data"]["objects"]["validation"] == {"block": 3, "stripe": 1}
    built_in = ["wire_bonding", *FLAGS, "--max_train_samples", "4", "--max_eval_samples", "2", "--built_in_size", "64"]
    record = main([*built_in, "--max_steps", "2", "--classes", "ball", "wedge", "--output_dir", str(tmp_path / "wire")])
    assert record["data"]["channels"] == 2 and all(record["data"]["objects"]["train"].values())


def test_an_oblong_view(folder: Path, tmp_path: Path) -> None:
    record = main(given(folder, tmp_path, "--max_steps", "2", "--image_size", "32", "48"))
    assert record["data"]["size"] == [32, 48]
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"height": 32, "width": 48}


def test_evaluation_alone_leaves_the_run_as_it_is(
    run: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, record = run
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    alone = [flag for flag in given(folder, place) if flag != "--do_train"]
    found = main([*alone, "--do_eval"])
    for name in ("map", "mask_map", "mar_100", "loss"):
        assert found[f"eval_{name}"] == pytest.approx(record[name], abs=1e-6)
    assert found["per_class"] == record["per_class"]
    (place / "eval_results.json").unlink()
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before
    content = json.loads((folder / "labels.json").read_text())
    content["categories"][1]["name"] = "circle"
    (tmp_path / "other.json").write_text(json.dumps(content))
    start = alone.index("--model_size")
    other = [str(folder / "images"), str(tmp_path / "other.json"), *alone[2:start], *alone[start + 2 :]]
    for flags, message in (
        ([*other, "--model_name_or_path", str(place), "--do_eval"], "does not know the class 'circle'"),
        ([*alone, "--eval_strategy", "no"], "nothing to do: give --do_train, --do_eval or both"),
        ([*alone, "--do_eval", "--output_dir", str(tmp_path / "none")], "no detector to evaluate"),
        ([*alone, "--do_eval", "--push_to_hub"], "--push_to_hub pushes what --do_train trains"),
    ):
        with pytest.raises(SystemExit):
            main(flags)
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size", "20"], "image size 20 is not a multiple of patch size 8"),
        (["--num_queries", "17"], "--num_queries 17: every query starts from a patch"),
        (["--decoder_width", "20"], "--decoder_width 20: give a multiple of 32"),
        (["--num_windows", "3"], "--num_windows 3 does not tile the 4 x 4 patches"),
        (["--query_groups", "0"], "--query_groups is a positive number"),
        (["--per_device_train_batch_size", "32"], "8 training images do not fill one step of 32"),
        (["--crop_scale", "0"], "--crop_scale is above 0"),
        (["--flip", "2"], "--flip is a share between 0 and 1"),
        (["--classes", "cube"], "--classes cube: there is no such class; there are block, stripe"),
        (["--metric_for_best_model", "mask_map"], "--metric_for_best_model of masks needs --instances"),
        (["--metric_for_best_model", "f1"], "invalid choice: 'f1'"),
        (["--num_channels", "7"], "cannot be read as 7 channels"),
        (["--train_mask_dir", "elsewhere.json"], "elsewhere.json: there is no such file of labels, or folder"),
        (["--validation_dir", "elsewhere"], "--validation_dir and --validation_mask_dir belong together"),
    ],
)
def test_mistakes_end_with_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(given(folder, tmp_path / "out", *flags))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error


def test_a_step_that_is_not_finite_is_skipped_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TrainingViews.__getitem__

    def broken(self: TrainingViews, index: tuple[int, int]) -> dict[str, Any]:
        view = whole(self, index)
        if index == (0, 3):
            view["pixel_values"][0, 2, 2] = float("nan")
        return view

    monkeypatch.setattr(TrainingViews, "__getitem__", broken)
    record = main(given(folder, tmp_path))
    assert record["guards"]["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


@pytest.mark.slow
def test_two_processes_make_one_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three validation images on two processes: each once, and the loss of the whole set is that of one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "training_scripts" / "run_detection.py")
    data = ["--train_dir", str(folder / "images"), "--train_mask_dir", str(folder / "labels.json"), *FLAGS]
    out = {name: ["--output_dir", str(tmp_path / name)] for name in ("one", "two")}
    frozen = ["--max_steps", "2", "--optim", "sgd", "--learning_rate", "0", "--per_device_eval_batch_size", "1"]
    done = subprocess.run(
        [*launcher, script, *data, *frozen, "--per_device_train_batch_size", "2", *out["two"]],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "eval.json").read_text())
    one = main(
        [str(folder / "images"), str(folder / "labels.json"), *FLAGS, *frozen, "--output_dir", str(tmp_path / "one")]
    )
    assert two["hardware"]["processes"] == 2
    for name in ("loss", "map", "mar_100", "mar_1"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)

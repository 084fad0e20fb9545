"""`hf-dbp finetune --head eomt`, from flags to a folder that predicts what evaluation scored, also without hf_dbp."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetuning import FLAGS as UPERNETS
from transformers import EomtForUniversalSegmentation

import hf_dbp
from hf_dbp.cli import main as front_door
from hf_dbp.downstream.segmentation.data import LabelledImages, SegmentationSource, load_labelled_images
from hf_dbp.downstream.segmentation.finetuning import image_processor, main
from hf_dbp.downstream.segmentation.inference import WholeImages
from hf_dbp.errors import UserError

OWN = UPERNETS.index("--head_size")  # and --auxiliary_head_size after it
FLAGS = [*UPERNETS[:OWN], *UPERNETS[OWN + 4 :], "--head", "eomt", "--num_queries", "6"]
EVALUATION = [flag for flag in FLAGS if flag != "--do_train"]

# what the card says, on a crop
ALONE = """
import sys; sys.modules["hf_dbp"] = None
folder, file, out, side = *sys.argv[1:4], int(sys.argv[4])
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

model = AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)
image = np.load(file).transpose(2, 0, 1)
with torch.no_grad():
    output = model(**processor(image, input_data_format="channels_first", return_tensors="pt"))
size = {"shortest_edge": side, "longest_edge": side}
ids = processor.post_process_semantic_segmentation(output, target_sizes=[(side, side)], size=size)[0]
np.save(out, ids.numpy())
"""


@pytest.fixture
def encoder(vit, tmp_path):
    vit(num_channels=2).save_pretrained(tmp_path / "vit")
    return ["--model_name_or_path", str(tmp_path / "vit")]


def labelled_files(folder):
    """The validation images of `FLAGS` with their masks, as files."""
    source = SegmentationSource(dataset_name="wire_bonding", built_in_size=48, max_train_samples=8, max_eval_samples=3)
    images = load_labelled_images(source)[1]
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(3):
        image_HWC, mask_HW = images[index]
        np.save(folder / "images" / f"{index}.npy", image_HWC)
        Image.fromarray(mask_HW.astype(np.uint8)).save(folder / "masks" / f"{index}.png")
    return folder / "images", folder / "masks"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_from_a_vit_to_a_stock_model_that_predicts_what_was_scored(encoder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--crop_size", "48", "--long_edge", "0", "--layer_decay", "0.8", "--rare_crops", "0.5"]
    record = main([*FLAGS, *encoder, *options, "--output_dir", str(out)])
    assert f"EoMT on wire_bonding: {out}" in capsys.readouterr().out
    assert record["mean_iou"] == max(row["eval_mean_iou"] for row in record["evaluations"])
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["num_queries"]) == (["EomtForUniversalSegmentation"], 6)
    card = (out / "README.md").read_text()
    assert "EoMT for semantic segmentation" in card and "| head | eomt |" in card
    images, masks = labelled_files(tmp_path)
    found = hf_dbp.predict(str(out), images, tmp_path / "predicted", masks=str(masks), no_overlays=True)
    assert found.record["mean_iou"] == record["mean_iou"]
    command = [sys.executable, "-c", ALONE, str(out), str(images / "0.npy"), str(tmp_path / "ids.npy"), "48"]
    subprocess.run(command, check=True, capture_output=True)
    with Image.open(tmp_path / "predicted" / "masks" / "0.png") as mask:
        assert (np.load(tmp_path / "ids.npy") == np.asarray(mask)).mean() > 0.999
    again = main([*EVALUATION, *encoder, *options[:4], "--output_dir", str(out)])
    assert again["eval_mean_iou"] == record["mean_iou"]
    front_door(["export", str(out), "wire_bonding", "--output_dir", str(tmp_path / "onnx")])
    checks = json.loads((tmp_path / "onnx" / "export.json").read_text())["checks"]
    assert max(check["largest_difference"] for check in checks) < 1e-4
    for refused in (
        lambda: hf_dbp.predict(str(out), images, tmp_path / "other", crop_size=32),
        lambda: main([*EVALUATION, *encoder, "--output_dir", str(out)]),
        lambda: front_door(["export", str(out), "wire_bonding", "--crop_size", "32", "--output_dir", str(tmp_path)]),
    ):
        with pytest.raises((UserError, SystemExit)) as stopped:
            refused()
        said = str(stopped.value) if stopped.type is UserError else capsys.readouterr().err
        assert "crop_size 32: an EoMT takes crops of its own size alone, so give --crop_size 48" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("channels", "depth"), [(4, np.uint16), (1, np.float32), (3, np.uint8)])
def test_other_channels_and_depths(vit, tmp_path, channels, depth):
    vit(num_channels=channels).save_pretrained(tmp_path / "vit")
    rng, most = np.random.default_rng(0), 1 if depth == np.float32 else np.iinfo(depth).max
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index in range(8):
        image_HWC = (rng.random((48, 56, channels)) * most).astype(depth)
        np.save(tmp_path / "images" / f"{index}.npy", image_HWC)
        mask_HW = rng.integers(0, 5, (6, 7), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(mask_HW).save(tmp_path / "masks" / f"{index}.png")
    folders = ["--train_dir", str(tmp_path / "images"), "--train_mask_dir", str(tmp_path / "masks")]
    start = ["--model_name_or_path", str(tmp_path / "vit"), "--max_steps", "2"]
    data = FLAGS.index("--dataset_name")
    folders += ["--validation_dir", folders[1], "--validation_mask_dir", folders[3], "--max_eval_samples", "8"]
    flags = [*FLAGS[:data], *FLAGS[data + 2 :], *folders, "--num_labels", "5", "--crop_size", "48", "--long_edge", "0"]
    record = main([*flags, *start, "--output_dir", str(tmp_path / "out")])
    found = hf_dbp.predict(str(tmp_path / "out"), folders[1], tmp_path / "predicted", masks=folders[3])
    assert found.record["mean_iou"] == record["mean_iou"] > 0


@pytest.mark.slow
def test_stopped_and_started_again_it_continues(encoder, tmp_path):
    flags = [*FLAGS, *encoder, "--lr_scheduler_type", "constant", "--max_steps", "4", "--output_dir"]
    whole = main([*flags, str(tmp_path / "whole")])
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    again = main([*flags, str(tmp_path / "parts")])
    curves = [{row["step"]: row["eval_loss"] for row in run["evaluations"]} for run in (whole, again)]
    assert list(curves[0]) == [2, 4]
    assert curves[0] == curves[1]
    one, other = (EomtForUniversalSegmentation.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "ce+dice"], "--loss ce+dice is for --head upernet: EoMT has a loss of its own"),
        (["--class_weights", "sqrt"], "--class_weights sqrt is for --head upernet"),
        (
            ["--head_size", "64"],
            "--head_size 64 is for --head upernet: leave it out (over a recipe, --head_size 512",
        ),
        (["--auxiliary_head_size", "64"], "--auxiliary_head_size 64 is for --head upernet"),
        (["--head", "upernet"], "--num_queries 6 is for --head eomt"),
        (["--num_queries", "4"], "--num_queries 4: every class needs one, so give 5 or more"),
        (["--num_blocks", "5"], "--num_blocks 5: the queries pass 1 to 4 layers"),
        (["--crop_size", "30"], "image size 30 is not a multiple of patch size 8"),
        (["--ignore_index", "2"], "ignore_index 2 is the class 'ball'"),
        (["--head", "mask2former"], "invalid choice: 'mask2former'"),
    ],
)
def test_mistakes_end_with_one_line(encoder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main([*FLAGS, *encoder, "--output_dir", str(tmp_path / "out"), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize(("channels", "scales"), [(1, True), (2, False), (3, True), (4, False)])
def test_the_image_processor_gives_what_evaluation_sees(channels, scales):
    image = np.random.default_rng(0).integers(0, 256, (50, 70, channels), dtype=np.uint8)
    images = LabelledImages([{"image": image, "annotation": image[..., 0]}], ("image", "annotation"), num_labels=256,
                            ignore_index=999)  # fmt: skip
    data = WholeImages(images, 40 if scales else None, [0.4] * channels, [0.2] * channels)
    processor = image_processor(data, 32)
    assert processor.do_resize == scales
    pixels = processor(image.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="pt").pixel_values
    torch.testing.assert_close(torch.as_tensor(np.stack(pixels))[0], data[0][0], rtol=0, atol=1e-5)

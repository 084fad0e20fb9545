"""A card says what the files of the run say, and nothing else."""

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    BeitImageProcessorPil,
    EomtImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)

from hf_dbp.data.values import processor_scaling
from hf_dbp.downstream.segmentation.eomt import build_eomt
from hf_dbp.downstream.segmentation.upernet import build_upernet
from hf_dbp.hub.model_card import main, write_card
from hf_dbp.records import RunRecord

ARGUMENTS = {
    "mask_ratio": 0.75,
    "decorrelated_layers": "encoder",
    "eta": 0.000731,
    "eta_schedule": "decay",
    "sample_fraction": 0.1,
    "learning_rate": 0.00217,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "model_name_or_path": None,
}
ROWS = [
    {"step": 10, "eval_loss": 0.51234, "kwh": 0.1},
    {"step": 20, "eval_loss": float("nan"), "kwh": 0.2},
    {"step": 30, "eval_loss": 0.61234, "kwh": 0.3},
]
ENERGY = {
    "country": "NLD",
    "carbon_intensity_g_per_kwh": 268.5,
    "cpu": "power counters",
    "ram": "estimated from size",
    "gpu": "none in use",
    "codecarbon": "3.3.2",
    "scope": "the whole machine",
}


@pytest.fixture
def folder(tmp_path):
    """A fused model with the record of a run that measured no energy."""
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16),
             add_pooling_layer=False).save_pretrained(tmp_path / "vit")  # fmt: skip
    write_record(tmp_path / "vit")
    return tmp_path / "vit"


def write_record(folder, *, source="wire_bonding", method="dbp", **fields):
    record = RunRecord("pretraining", method, "muon", 5, arguments=ARGUMENTS, rows=ROWS, **fields)
    record.data = {"source": source, "train_images": 321, "validation_images": 45}
    record.hardware |= {"processes": 2}
    record.write(folder / "run.json")


def test_figures_come_from_the_record_and_missing_ones_are_left_out(folder):
    card = ModelCard.load(write_card(folder))
    result = card.data.eval_results[0]
    assert len(card.data.eval_results) == 1
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("mse", 0.51234, "wire_bonding")
    for text in (
        "| 0.5123 |",
        "0.000731",
        "0.00217",
        "| 64 |",
        "321 training and 45 validation images",
        "seed 5",
        "DBP",
    ):
        assert text in card.text, text
    for text in ("kWh", "CO2", "interpolated", "mIoU", "IoU", "None", "nan", ".png", "row_floor"):
        assert text not in card.text, text
    assert "co2_eq_emissions" not in card.data.to_dict()


@pytest.mark.parametrize("bound", [True, False])
def test_the_bound_on_eta_is_told_either_way(folder, monkeypatch, bound):
    monkeypatch.setitem(ARGUMENTS, "bound_eta", bound)
    write_record(folder)
    assert f"eta kept below 1 / the largest eigenvalue of cov(z) | {bound} |" in write_card(folder).read_text("utf-8")


def test_emissions_once_measured(folder):
    write_record(folder, energy=ENERGY, results={"kwh": 0.42, "co2e_kg": 0.11277, "train_seconds": 12.5})
    card = ModelCard.load(write_card(folder))
    emissions = card.data.to_dict()["co2_eq_emissions"]
    assert emissions["emissions"] == pytest.approx(112.77)  # grams
    assert (emissions["training_type"], emissions["geographical_location"]) == ("pre-training", "NLD")
    assert "268.5 g/kWh" in emissions["source"]
    assert "the whole machine" in card.text
    assert emissions["hardware_used"]
    assert "| energy of training in kWh | 0.42 |" in card.text  # of the whole run, not of its best evaluation


def test_a_baseline_is_not_called_dbp(folder):
    write_record(folder, method="bp")
    card = ModelCard.load(write_card(folder))
    assert "decorrelated-backpropagation" not in card.data.tags
    assert "plain backpropagation" in card.text
    assert "eta" not in card.text.partition("## Citation")[0].replace("beta", "")


def test_a_hub_data_set_is_linked_and_a_folder_keeps_its_place_to_itself(folder, tmp_path):
    write_record(folder, source="ILSVRC/imagenet-1k")
    assert ModelCard.load(write_card(folder)).data.datasets == ["ILSVRC/imagenet-1k"]
    (tmp_path / "secret" / "images").mkdir(parents=True)
    write_record(folder, source=str(tmp_path / "secret" / "images"))
    card = ModelCard.load(write_card(folder, "me/vit"))
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_name == "images"
    assert str(tmp_path) not in str(card)


def test_pictures_that_are_there_are_shown_and_the_command_copies_all(folder, tmp_path, capsys):
    (folder / "curves.png").write_bytes(b"picture")
    main([str(folder), "--hub_model_id", "me/demo", "--output_dir", str(tmp_path / "cards")])
    assert {file.name for file in (tmp_path / "cards").iterdir()} == {"README.md", "run.json", "curves.png"}
    text = (tmp_path / "cards" / "README.md").read_text()
    assert "](curves.png)" in text
    assert "reconstruction.png" not in text
    assert 'ViTModel.from_pretrained("me/demo", add_pooling_layer=False)' in text
    assert "# demo" in text
    assert (folder / "README.md").read_text() == text


@pytest.mark.parametrize(("more", "cells"), [
    ({"dice": 0.6035, "precision": 0.5, "recall": 0.75}, "0.6035 | 0.5000 | 0.7500"), ({}, "- | - | -"),
])  # fmt: skip
def test_segmentation_scores_with_a_class_that_is_absent(tmp_path, more, cells):
    """With the figures of a current record, and of one of 0.1.0."""
    encoder = {"num_hidden_layers": 4, "hidden_size": 8, "patch_size": 8, "num_channels": 2, "image_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "upernet", "backbone_config": encoder}))
    run = {"seed": 0, "versions": {}, "hardware": {"processor": "x", "cores": 2, "processes": 1}}
    record = run | {
        "task": "segmentation",
        "mean_iou": 0.4321,
        "mean_accuracy": 0.6,
        "overall_accuracy": 0.7,
        "loss": 1.25,
        "per_class": {
            "wire": more | {"iou": 0.4321, "accuracy": 0.6, "pixels": 9},
            "ball": {"iou": None, "accuracy": None, "pixels": 0},
        },
        "arguments": ARGUMENTS | {"model_name_or_path": "me/vit", "crop_size": 16, "long_edge": 24},
        "data": {"source": "me/labels", "train_images": 4, "validation_images": 2},
    }
    (tmp_path / "eval.json").write_text(json.dumps(record))
    card = ModelCard.load(write_card(tmp_path))
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {"mean_iou": 0.4321, "mean_accuracy": 0.6, "accuracy": 0.7}
    assert card.data.base_model == "me/vit"
    assert "| class | IoU | Dice | precision | recall | accuracy | pixels |\n|" in card.text
    assert f"\n| wire | 0.4321 | {cells} | 0.6000 | 9 |\n" in card.text
    assert "\n| ball | - | - | - | - | - | 0 |\n" in card.text
    assert "to a long edge of 24 pixels" in card.text


def test_a_model_without_record_has_a_card_without_figures(folder):
    (folder / "run.json").unlink()
    card = ModelCard.load(write_card(folder))
    assert card.data.eval_results is None
    assert "## Training" not in card.text
    assert "## Load it" in card.text


def test_folders_that_hold_none_of_our_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        write_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not for bert"):
        write_card(tmp_path)


# ---- what a stock pipeline can do ----

PICTURES = {
    mode: Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).convert(mode)
    for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1")
}


def written(folder, kind, channels, dtype):
    """A model of this kind with the image processor that training writes, and its card."""
    shape = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 1, "intermediate_size": 8}
    vit = ViTModel(ViTConfig(**shape, image_size=32, patch_size=8, num_channels=channels), add_pooling_layer=False)
    scaling = processor_scaling(np.dtype(dtype), (-1000.0, 2000.0), [0.5] * channels, [0.25] * channels)
    if kind == "vit":
        vit.save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 32, "width": 32}, **scaling).save_pretrained(folder)
    elif kind == "eomt":
        build_eomt(vit, {0: "road", 1: "sky"}, crop_size=32).save_pretrained(folder)
        EomtImageProcessorPil(do_resize=False, **scaling).save_pretrained(folder)
    else:
        names = {0: "road", 1: "sky"}
        model = build_upernet(vit, names, ignore_index=255, hidden_size=8, auxiliary_channels=8)
        model.save_pretrained(folder)
        BeitImageProcessorPil(do_center_crop=False, do_resize=False, **scaling).save_pretrained(folder)
    return ModelCard.load(write_card(folder))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["vit", "upernet"])
def test_a_pipeline_is_promised_where_one_works(tmp_path, kind, channels, dtype):
    card = written(tmp_path, kind, channels, dtype)
    tag = "image-segmentation" if kind == "upernet" else "image-feature-extraction"
    if (channels, dtype) == (3, "uint8"):
        assert card.data.pipeline_tag == tag and "transformers' pipelines" not in card.text
        works = pipeline(tag, model=str(tmp_path), device="cpu")
        for picture in PICTURES.values():
            works(picture)
        return
    assert card.data.pipeline_tag is None and "transformers' pipelines" in card.text
    if channels != 3:
        with pytest.raises(Exception):  # noqa: B017  # whatever transformers stumbles over
            pipeline(tag, model=str(tmp_path), device="cpu")(PICTURES["RGB"])


@pytest.mark.parametrize("channels", [2, 3])
def test_an_eomt_takes_crops_alone_so_no_pipeline_is_promised(tmp_path, channels):
    card = written(tmp_path, "eomt", channels, "uint8")
    assert card.data.pipeline_tag is None and "semantic-segmentation" in card.data.tags
    assert "Transformers' pipelines do not work with it" in card.text and "crops of 32 x 32 pixels alone" in card.text
    with pytest.raises(Exception):  # noqa: B017  # whatever transformers stumbles over
        pipeline("image-segmentation", model=str(tmp_path), device="cpu")(PICTURES["RGB"])


def test_without_an_image_processor_no_pipeline_is_promised(tmp_path):
    written(tmp_path, "vit", 3, "uint8")
    (tmp_path / "preprocessor_config.json").unlink()
    assert ModelCard.load(write_card(tmp_path)).data.pipeline_tag is None

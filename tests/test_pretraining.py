"""The script's path from flags to a folder: it trains, resumes, records, refuses, and leaves stock models behind."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTMAEForPreTraining, ViTModel

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.conversion import decorrelated_layers
from hf_dbp.data.images import ImageSource, channel_statistics, load_images
from hf_dbp.fusing import check_views
from hf_dbp.fusing import main as fuse_main
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, RectangularViTMAE
from hf_dbp.pretraining import build_model, main, pixel_statistics
from hf_dbp.records import RunRecord
from hf_dbp.training.arguments import ModelArguments, PretrainingArguments
from hf_dbp.training.restoring import restore_weights

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
FLAGS = {
    "dataset_name": "wire_bonding",
    "built_in_size": 48,
    "max_train_samples": 24,
    "max_eval_samples": 6,
    "config_overrides": "num_hidden_layers=2,hidden_size=32,num_attention_heads=2,intermediate_size=64",
    "model_size": "mini",
    "image_size": 32,
    "patch_size": 8,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "num_train_epochs": 4,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "update_interval": 1,  # runs of a few steps
    "logging_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "do_train": True,
    "do_eval": True,
    "disable_tqdm": True,
}


def flags(output_dir, **changed):
    given = {key: value for key, value in (FLAGS | {"output_dir": output_dir} | changed).items() if value is not None}
    parts = [
        [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])] for key, value in given.items()
    ]
    return [part for pair in parts for part in pair]


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def losses(record):
    return [row["eval_loss"] for row in record.rows]


@pytest.mark.parametrize("method", ["dbp", "bp", "stock"])
def test_every_method_trains_saves_and_fuses_to_a_stock_vit(real_pictures, tmp_path, method, capsys):
    record = main(flags(tmp_path / "run", method=method, optimizer="muon" if method == "bp" else "adamw"))
    assert [row["step"] for row in record.rows] == [3, 6, 9, 12]
    assert losses(record)[-1] < losses(record)[0]
    assert RunRecord.read(tmp_path / "run" / "run.json") == record
    assert record.data["channels"] == 2
    assert (record.data["train_images"], record.data["validation_images"]) == (24, 6)
    assert all(row["train_seconds"] > 0 and math.isfinite(row["train_loss"]) for row in record.rows)
    figures = ("decorrelation_loss", "mean_squared_correlation", "kwh", "co2e_kg", "step_seconds")
    assert all(row[name] > 0 for row in record.rows for name in figures)
    assert record.results["finished"]
    for name in ("reconstruction.png", "curves.png", "preprocessor_config.json"):
        assert (tmp_path / "run" / name).is_file(), name
    fuse_main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "vit"), "--num_images", "2"])
    vit = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    assert vit(torch.zeros(1, 2, 32, 32)).last_hidden_state.shape == (1, 17, 32)
    assert "largest difference" in capsys.readouterr().out


def test_stock_and_bp_give_the_same_curve(tmp_path):
    """The baseline of every comparison is the stock model, trained in the same way."""
    curves = [losses(main(flags(tmp_path / method, method=method, num_train_epochs=2))) for method in ("stock", "bp")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


WHOLE_MODEL = {"decorrelated_layers": "full", "wide_blocks": 4, "update_interval": 5, "eta": 2e-3, "kappa": 0.1}


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "adamw", "update_interval": 1},
        {"optimizer": "muon", "update_interval": 1, "wide_blocks": 4},
        {"optimizer": "muon", **WHOLE_MODEL},
        {"optimizer": "soap", **WHOLE_MODEL},
        {"optimizer": "soap", "method": "bp"},
    ],
    ids=["adamw", "blocks", "whole model", "soap", "soap on bp"],
)
@pytest.mark.slow
def test_a_resumed_run_continues_to_the_bit(tmp_path, given):
    """With an update every 5 steps it resumes between two of them, at step 6."""
    whole = main(flags(tmp_path / "whole", **given, save_total_limit=None))
    half = tmp_path / "half"
    main(flags(half, **given))
    for name in ("checkpoint-9", "checkpoint-12"):  # as if the run had been killed after two of its four epochs
        for file in (half / name).iterdir():
            file.unlink()
        (half / name).rmdir()
    resumed = main(flags(half, **given))
    assert losses(resumed) == losses(whole)
    assert resumed.rows[-1]["train_seconds"] > resumed.rows[1]["train_seconds"]
    one, other = (DBPViTMAEForPreTraining.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "half"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_another_command_in_the_same_folder_is_refused_or_told(tmp_path, capsys, caplog):
    run = {"num_train_epochs": 1}
    main(flags(tmp_path, **run))
    before = contents(tmp_path)
    for changed, message in (
        ({"method": "bp"}, "was trained with --method dbp, not bp: to resume, give --method dbp; to start over, "),
        ({"optimizer": "muon"}, "was trained with --optimizer adamw, not muon: to resume, give --optimizer adamw; "),
        ({"decorrelated_layers": "full"}, "with --decorrelated_layers encoder, not full: to resume, give "),
        ({"wide_blocks": 4}, "with --wide_blocks 1, not 4: to resume, give --wide_blocks 1; to start over, "),
        ({"seed": 1}, "with --seed 42, not 1: to resume, give --seed 42; to start over, use another --output_dir"),
        (
            {"model_name_or_path": tmp_path},
            "with --model_name_or_path None, .*: to resume, leave --model_name_or_path out",
        ),
        ({"patch_size": 4}, "whose shapes differ from the model's, among them .*; to resume, give the flags it was "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(flags(tmp_path, **run, **changed))
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
        assert contents(tmp_path) == before
    caplog.clear()
    record = main(flags(tmp_path, num_train_epochs=2, eta=1e-4, logging_steps=1, built_in_size=40))
    told = [text for text in caplog.messages if "resumes with" in text]
    news = (
        "resumes with other settings: --built_in_size 48 -> 40, --eta 0.0005 -> 0.0001, --num_train_epochs 1.0 -> 2.0"
    )
    assert told == [f"{tmp_path / 'checkpoint-3'} {news}"]
    changed = {"built_in_size": [48, 40], "num_train_epochs": [1.0, 2.0], "eta": [5e-4, 1e-4]}
    assert record.results["resumed_with"] == {"3": changed}
    again = RunRecord.read(tmp_path / "checkpoint-6" / "run.json")
    assert again.results["resumed_with"] == {"3": changed}


def test_a_run_saves_when_it_evaluates_unless_told_otherwise():
    given = {"eval_strategy": "epoch", "report_to": "none", "use_cpu": True}
    assert PretrainingArguments(**given).save_strategy == "epoch"
    assert PretrainingArguments(**given, save_strategy="no", load_best_model_at_end=False).save_strategy == "no"
    assert PretrainingArguments(report_to="none", use_cpu=True).save_strategy == "steps"


def test_a_run_on_native_tiles_is_fused_on_them(tmp_path):
    main(flags(tmp_path, num_train_epochs=1, native_tiles=True))
    assert check_views(tmp_path).native


def test_the_best_checkpoint_is_what_remains(tmp_path):
    """A learning rate that ruins the model in the end must not ruin what is saved."""
    record = main(flags(tmp_path, learning_rate=60.0, warmup_steps=1000, num_train_epochs=2))  # only ever warms up
    assert record.best["step"] < record.rows[-1]["step"]
    kept = DBPViTMAEForPreTraining.from_pretrained(tmp_path)
    best = DBPViTMAEForPreTraining.from_pretrained(tmp_path / f"checkpoint-{record.best['step']}")
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), best.state_dict().values(), strict=True))


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """4 micro-batches of 2 = 1 batch of 8: the Trainer's own loss scaling would make it 4 times too large."""
    shared = {"num_train_epochs": 2, "sample_fraction": 1.0, "eta": 0.01, "eta_schedule": "constant"}
    one = main(flags(tmp_path / "one", **shared))
    many = main(flags(tmp_path / "many", per_device_train_batch_size=2, gradient_accumulation_steps=4, **shared))
    assert losses(one) == pytest.approx(losses(many), rel=1e-5)
    assert one.rows[-1]["decorrelation_loss"] == pytest.approx(many.rows[-1]["decorrelation_loss"], rel=1e-4)


def test_evaluation_weighs_every_image_once(tmp_path):
    """6 images in batches of 4 and of 6 give the same loss."""
    pair = [main(flags(tmp_path / str(b), num_train_epochs=1, per_device_eval_batch_size=b)) for b in (4, 6)]
    assert losses(pair[0]) == pytest.approx(losses(pair[1]), rel=1e-6)


def test_restoring_refuses_an_incomplete_checkpoint(tmp_path, mae_config):
    model = DBPViTMAEForPreTraining(mae_config())
    state = model.state_dict()
    state.pop("vit.layers.1.mlp.fc1.decorrelation.R")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 tensors, among them vit\.layers\.1\.mlp\.fc1\.decorrelation\.R"):
        restore_weights(model, str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decorrelated_layers": "none"}, "has 9 tensors that the model lacks"),
        ({"decorrelated_layers": "full"}, "lacks 6 tensors of the model"),
        ({"num_hidden_layers": 1}, "has 20 tensors that the model lacks"),
        ({"wide_blocks": 4}, "lacks 2 tensors of the model"),
        ({"intermediate_size": 24}, "has 8 tensors whose shapes differ from the model's"),
    ],
)
def test_restoring_refuses_the_checkpoint_of_another_model(tmp_path, mae_config, changed, message):
    DBPViTMAEForPreTraining(mae_config()).save_pretrained(tmp_path)
    model = DBPViTMAEForPreTraining(mae_config(**changed))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        restore_weights(model, str(tmp_path))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("changed", [{"method": "bp"}, {"method": "stock"}, {"decorrelated_layers": "block_inputs"}])
def test_a_decorrelated_checkpoint_is_a_start_for_every_method(tmp_path, mae_config, changed):
    """The same function, whichever layers are decorrelated from now on."""
    source = DBPViTMAEForPreTraining(mae_config()).eval()
    with torch.no_grad():
        for _, layer in decorrelated_layers(source):
            layer.decorrelation.R.add_(0.05 * torch.randn_like(layer.decorrelation.R))
    source.save_pretrained(tmp_path)
    model = build_model(ModelArguments(model_name_or_path=str(tmp_path), **changed), 3, seed=0).eval()
    kept = {name: layer.decorrelation.R for name, layer in decorrelated_layers(model)}
    assert len(kept) == (5 if "decorrelated_layers" in changed else 0)
    assert all(torch.equal(R, source.get_submodule(name).decorrelation.R) for name, R in kept.items())
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "noise": torch.rand(2, 16)}
    torch.testing.assert_close(model(**batch).loss, source(**batch).loss)


@pytest.mark.parametrize(
    ("asked", "mean"),
    [({}, [0.1, 0.2, 0.3]), ({"image_statistics": "imagenet"}, [0.485, 0.456, 0.406]), ({"channels": 2}, None)],
)
def test_a_checkpoint_brings_its_statistics(tmp_path, asked, mean):
    processor = {"image_mean": [0.1, 0.2, 0.3][: asked.pop("channels", 3)], "image_std": [0.5] * 3}
    processor["image_std"] = processor["image_std"][: len(processor["image_mean"])]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    picture_folder(tmp_path / "pictures", 1)
    images, _ = load_images(
        ImageSource(train_dir=str(tmp_path / "pictures"), validation_dir=str(tmp_path / "pictures"))
    )
    arguments = ModelArguments(model_name_or_path=str(tmp_path), **asked)
    found = pixel_statistics(arguments, images, 3, tmp_path)[0]
    assert found == pytest.approx(mean or channel_statistics(images, "auto", tmp_path)[0])


def test_a_share_of_the_validation_images_without_a_readable_one(tmp_path, monkeypatch, capsys):
    """If one process has none, its layers are measured on the next readable image; if all have none, it is a
    mistake."""

    def read_nothing(trainer, _):
        assert trainer.evaluation_row(0.5)["mean_squared_correlation"] > 0
        trainer.get_eval_dataloader = lambda *_: [{}]
        trainer.evaluate()

    monkeypatch.setattr("hf_dbp.pretraining.evaluate_alone", read_nothing)
    with pytest.raises(SystemExit):
        main(flags(tmp_path, do_train=False))
    assert "error: none of the 6 validation images can be read" in capsys.readouterr().err


def test_sizes_come_from_a_vit_alone(tmp_path, capsys):
    """The configuration of another architecture has fields of the same names that mean something else."""
    (tmp_path / "config.json").write_text('{"model_type": "swin", "num_layers": 4, "hidden_size": 96}')
    with pytest.raises(SystemExit):
        main(flags(tmp_path / "run", config_name=tmp_path, model_size=None, config_overrides=None))
    assert "holds a 'swin' model; give a ViT-MAE or a ViT" in capsys.readouterr().err.splitlines()[-1]


def test_a_public_checkpoint_is_a_start(tmp_path, mae_config):
    stock = RectangularViTMAE(mae_config(num_channels=2))
    ViTMAEForPreTraining.save_pretrained(stock, tmp_path / "public")
    config = json.loads((tmp_path / "public" / "config.json").read_text()) | {"model_type": "vit_mae"}
    (tmp_path / "public" / "config.json").write_text(json.dumps(config))
    main(
        flags(
            tmp_path / "run",
            model_name_or_path=tmp_path / "public",
            model_size=None,
            config_overrides=None,
            image_size=None,
            patch_size=None,
            learning_rate=0.0,
            num_train_epochs=1,
        )
    )
    model = DBPViTMAEForPreTraining.from_pretrained(tmp_path / "run")
    assert isinstance(model.config, DBPViTMAEConfig)
    key = "vit.layers.1.mlp.fc2.weight"
    assert torch.equal(model.state_dict()[key], stock.state_dict()[key])


@pytest.mark.parametrize("method", ["stock", "bp", "dbp"])
def test_loading_leaves_position_tables_fixed(tmp_path, mae_config, method):
    """transformers' from_pretrained makes every tensor trainable; tables and R must not be."""
    DBPViTMAEForPreTraining(mae_config(decorrelated_layers="none")).fuse().save_pretrained(tmp_path)
    model = build_model(ModelArguments(method=method, model_name_or_path=str(tmp_path)), 3, seed=0)
    fixed = {
        name for name, p in model.named_parameters() if not p.requires_grad and not name.endswith("decorrelation.R")
    }
    assert fixed == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}


def picture_folder(folder, count, mode="RGB"):
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{index}.png")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 33}, "image size 33 is not a multiple of patch size 8; use 32 or 40"),
        ({"sample_fraction": 0.0}, r"the sample fraction must lie in \(0, 1\], got 0.0"),
        ({"sample_fraction": 1.5}, r"the sample fraction must lie in \(0, 1\], got 1.5"),
        ({"num_channels": 3}, "wire_bonding images have 2 channels"),
        ({"trust_remote_code": True}, "--trust_remote_code: code from a model or a data set is never run"),
        ({"decorrelated_layers": "none"}, "is plain backprop: use --method bp"),
        (
            {"decorrelated_layers": "block_inputs", "wide_blocks": 4},
            "--wide_blocks 4: --decorrelated_layers block_inputs gives the second MLP linear no R",
        ),
        ({"mask_ratio": 1.0}, "--mask_ratio is a share between 0 and 1"),
        ({"max_train_samples": 4}, "4 training images do not fill one batch of 8"),
        ({"dataset_name": None}, "no data: give --train_dir"),
        ({"dataset_name": None, "train_dir": "{tmp}/absent"}, "there is no such folder"),
        ({"dataset_name": None, "train_dir": "{tmp}/empty"}, "holds nothing; expected pictures"),
        ({"dataset_name": None, "train_dir": "{tmp}/text"}, r"holds only \.txt files; expected pictures"),
        (
            {"dataset_name": None, "train_dir": "{tmp}/pictures", "image_column_name": "photo"},
            "no column 'photo'.*image",
        ),
        ({"dataset_name": None, "train_dir": "{tmp}/pictures", "num_channels": 4}, "cannot be read as 4 channels"),
        ({"learnin_rate": 1}, "unknown flag --learnin_rate; did you mean --learning_rate"),
    ],
)
def test_mistakes_end_in_one_line_before_training(tmp_path, changed, message, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    picture_folder(tmp_path / "pictures", 12)
    changed = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changed.items()}
    with pytest.raises(SystemExit) as stop:
        main(flags(tmp_path / "run", **changed))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr_scheduler_type": "polynomial", "warmup_steps": 12}, "over 12 steps, 12 of them warm-up.*--warmup_steps"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 0}, "a --learning_rate above 0"),
        ({"lr_scheduler_kwargs": '{"decay": 2}'}, "unexpected keyword argument 'decay'"),
    ],
)
def test_a_schedule_that_cannot_be_ends_in_one_line_before_its_first_step(tmp_path, changed, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags(tmp_path / "run", **changed))
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_of_pictures_and_rectangles(tmp_path):
    picture_folder(tmp_path / "pictures", 20)
    for method in ("dbp", "stock"):
        record = main(
            flags(
                tmp_path / method,
                dataset_name=None,
                train_dir=tmp_path / "pictures",
                image_size=[32, 48],
                method=method,
                num_train_epochs=1,
                gradient_checkpointing=True,
                max_train_samples=None,
                max_eval_samples=None,
            )
        )
        assert record.data["size"] == [32, 48]
        assert (record.data["train_images"], record.data["validation_images"]) == (17, 3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data here: real photographs not tested")
def test_photographs_in_parquet(tmp_path):
    record = main(
        flags(
            tmp_path, dataset_name=None, train_dir=SHARED / "imagenet_samples", max_train_samples=32, num_train_epochs=1
        )
    )
    assert record.data["channels"] == 3
    assert record.data["validation_images"] == 6


def test_tensorboard_shows_what_is_decorrelated(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    record = main(flags(tmp_path / "run", report_to="tensorboard", logging_steps=3, num_train_epochs=2))
    (folder,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents.*")}
    board = events.EventAccumulator(str(folder)).Reload()
    logged = {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}
    for name in ("decorrelation_loss", "mean_squared_correlation", "images_per_second", "data_wait_share"):
        assert [step for step, _ in logged[f"train/{name}"]] == [3, 6], name
        assert all(value >= 0 for _, value in logged[f"train/{name}"])
    assert [value for _, value in logged["eval/loss"]] == pytest.approx(losses(record))


RECIPE_IN_SMALL = {
    **dict.fromkeys(("update_interval", "num_train_epochs", "logging_steps", "do_train", "do_eval")),
    **{"config": "imagenet10_dbp.yaml", "train_fraction": 1.0, "bf16": False, "gradient_accumulation_steps": 1},
    **{"dataloader_num_workers": 0, "dataloader_persistent_workers": False, "max_steps": 20, "warmup_steps": 2},
    **{"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no", "load_best_model_at_end": False},
}
LOSSES = [1.540963, 1.371306, 1.315813, 1.307571]
NORMS = [0.286265, 0.085112, 0.051472, 0.081118, 0.077495, 0.080858, 0.072126, 0.086191, 0.060200]  # of R - I


def test_twenty_steps_of_the_papers_recipe_end_where_they_did(tmp_path):
    """Recorded with the code of 2026-11-20, whose weights and R were the same to the bit, and the same to six digits
    without a CPU's vector instructions."""
    record = main(flags(tmp_path, **RECIPE_IN_SMALL))
    assert [row["eval_loss"] for row in record.rows] == pytest.approx(LOSSES, rel=1e-5)
    model = DBPViTMAEForPreTraining.from_pretrained(tmp_path)
    matrices = [layer.decorrelation.R for _, layer in decorrelated_layers(model)]
    assert [float((R - torch.eye(len(R))).norm()) for R in matrices] == pytest.approx(NORMS, rel=1e-5, abs=2e-6)

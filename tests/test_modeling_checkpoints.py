"""What is written and read back: our checkpoints, stock ones under new and old names, and fused ones without hf_dbp."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.conversion import decorrelated_layers, fuse
from hf_dbp.layers import Decorrelation
from hf_dbp.modeling_dbp_vit_mae import (
    DBPViTMAEForPreTraining,
    DBPViTMAEModel,
    extract_vit,
    initialize_mae_,
)
from hf_dbp.update import update_decorrelation

Maker = Callable[..., DBPViTMAEConfig]
WEIGHTS = "model.unfused.safetensors"


def trained(config: DBPViTMAEConfig) -> DBPViTMAEForPreTraining:
    """A model in which no tensor has the value it is initialised with."""
    model = DBPViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def stock_model(mae_config: Maker) -> ViTMAEForPreTraining:
    fields = mae_config().to_dict()
    known = ViTMAEConfig.__dataclass_fields__.keys() - {"model_type", "architectures"}
    stock = ViTMAEForPreTraining(ViTMAEConfig(**{k: v for k, v in fields.items() if k in known})).eval()
    initialize_mae_(stock)
    return stock


def trainable(model: ViTMAEForPreTraining) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "noise": torch.rand(2, 16)}


def tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / name)


@pytest.mark.parametrize("choice", ["encoder", "full", "none"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_every_tensor_round_trips_once(mae_config: Maker, tmp_path: Path, choice: str, shard: str) -> None:
    model = trained(mae_config(decorrelated_layers=choice, num_channels=2, image_size=(16, 40)))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("model*.safetensors"))
    assert len(files) > 1 if shard == "20KB" else [file.name for file in files] == [WEIGHTS]
    saved = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118 (no mapping)
    assert sorted(saved) == sorted(model.state_dict())
    assert sum(name.endswith("decorrelation.R") for name in saved) == len(list(decorrelated_layers(model)))
    for loaded in (
        DBPViTMAEForPreTraining.from_pretrained(tmp_path),
        AutoModelForPreTraining.from_pretrained(tmp_path),
    ):
        assert type(loaded) is DBPViTMAEForPreTraining
        assert loaded.config.decorrelated_layers == choice
        assert loaded.config.image_size == [16, 40]
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert trainable(loaded) == trainable(model)


def test_the_encoder_loads_by_itself(mae_config: Maker, tmp_path: Path) -> None:
    model = trained(mae_config())
    model.save_pretrained(tmp_path)
    for encoder in (DBPViTMAEModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(encoder) is DBPViTMAEModel
        for name, value in model.vit.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], value), name
    assert type(AutoConfig.from_pretrained(tmp_path)) is DBPViTMAEConfig


@pytest.mark.parametrize("how", ["dtype", "to"])
def test_R_stays_float32_in_a_bf16_model(mae_config: Maker, tmp_path: Path, how: str) -> None:
    model = trained(mae_config())
    model.save_pretrained(tmp_path)
    if how == "dtype":
        low = DBPViTMAEForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        low = DBPViTMAEForPreTraining.from_pretrained(tmp_path).to(torch.bfloat16)
    for name, parameter in low.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(".R") else torch.bfloat16), name
    exact = dict(decorrelated_layers(model))
    assert all(torch.equal(d.decorrelation.R, exact[name].decorrelation.R) for name, d in decorrelated_layers(low))
    low.save_pretrained(tmp_path / "again")
    again = tensors(tmp_path / "again", WEIGHTS)
    assert {value.dtype for name, value in again.items() if name.endswith(".R")} == {torch.float32}
    assert torch.isfinite(low(inputs()["pixel_values"].bfloat16()).loss)


def old_names(folder: Path) -> None:
    """Rename a stock checkpoint's tensors to those that transformers v4 wrote, as in facebook/vit-mae-base."""
    state = tensors(folder, "model.safetensors")
    pairs = [
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ]
    renamed = {}
    for name, value in state.items():
        old = name
        for new_part, old_part in pairs:
            old = old.replace(new_part, old_part)
        renamed[old] = value
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("names", ["v5", "v4", "as saved by default"])
def test_stock_checkpoints_start_at_identity_with_the_stock_loss(
    mae_config: Maker, tmp_path: Path, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    stock = stock_model(mae_config)
    stock.save_pretrained(tmp_path, save_original_format=names == "as saved by default")
    if names == "v4":
        old_names(tmp_path)
    saved = tensors(tmp_path, "model.safetensors").keys()
    expected = {
        "v5": {"vit.layers.1.attention.q_proj.weight", "decoder.decoder_layers.0.mlp.fc2.bias"},
        "v4": {
            "vit.embeddings.cls_token",
            "vit.encoder.layer.1.attention.attention.query.weight",
            "vit.encoder.layer.1.attention.output.dense.bias",
            "vit.encoder.layer.1.intermediate.dense.weight",
            "vit.encoder.layer.1.output.dense.weight",
            "vit.encoder.layer.1.layernorm_before.weight",
            "decoder.decoder_layers.0.attention.attention.value.bias",
            "decoder.decoder_layers.0.intermediate.dense.weight",
            "decoder.decoder_pred.weight",
        },
        # transformers 5.23 mangles the decoder's on the way out; it reads them back all the same
        "as saved by default": {
            "vit.encoder.layer.1.attention.attention.query.weight",
            "decoder.decoder_encoder.layer.0.attention.attention.query.weight",
        },
    }
    assert expected[names] <= saved
    model = DBPViTMAEForPreTraining.from_pretrained(tmp_path).eval()
    assert not caplog.records  # nothing starts afresh
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(torch.equal(d.decorrelation.R, torch.eye(len(d.decorrelation.R))) for _, d in decorrelated_layers(model))
    assert trainable(model) == trainable(stock)  # every other tensor than the R and the position tables
    batch = inputs()
    torch.testing.assert_close(model(**batch).loss, stock(**batch).loss)
    encoder = DBPViTMAEModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in stock.vit.state_dict().items())


def test_fields_of_the_configuration_override_a_checkpoints(mae_config: Maker, tmp_path: Path) -> None:
    stock_model(mae_config).save_pretrained(tmp_path)
    model = DBPViTMAEForPreTraining.from_pretrained(tmp_path, decorrelated_layers="block_inputs", mask_ratio=0.5)
    assert (model.config.decorrelated_layers, model.config.mask_ratio) == ("block_inputs", 0.5)
    assert len(list(decorrelated_layers(model))) == 5
    model, report = DBPViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.endswith("decorrelation.R") for name in report["missing_keys"])


def test_an_encoder_only_checkpoint_says_which_weights_start_afresh(
    mae_config: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vit = extract_vit(stock_model(mae_config))
    vit.save_pretrained(tmp_path)
    model = DBPViTMAEForPreTraining.from_pretrained(
        tmp_path, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
    )
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_dbp")]
    assert "start from their initialisation" in message
    assert "decoder.mask_token" in message
    assert "decorrelation" not in message
    assert "vit." not in message
    assert torch.equal(model.vit.layers[1].mlp.fc1.weight, vit.layers[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    "lost", ["vit.layers.1.attention.decorrelation.R", "vit.layers.0.mlp.fc2.decorrelation.R", "vit.layernorm.bias"]
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(mae_config: Maker, tmp_path: Path, lost: str) -> None:
    trained(mae_config()).save_pretrained(tmp_path)
    state = tensors(tmp_path, WEIGHTS)
    del state[lost]
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors, among them {lost}"):
        DBPViTMAEForPreTraining.from_pretrained(tmp_path)


@pytest.mark.parametrize("stock_class", [ViTModel, ViTMAEForPreTraining])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_stock_classes_refuse_an_unfused_checkpoint(mae_config: Maker, tmp_path: Path, stock_class, shard) -> None:
    trained(mae_config()).save_pretrained(tmp_path, max_shard_size=shard)
    with pytest.raises(OSError, match="no file named model"):
        stock_class.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named model"):
        stock_class.from_pretrained(tmp_path, config=ViTConfig() if stock_class is ViTModel else ViTMAEConfig())


LOADER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_dbp":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, ViTForImageClassification, ViTMAEForPreTraining, ViTModel
folder = sys.argv[1]
assert AutoConfig.from_pretrained(folder + "/vit").model_type == "vit"
batch, missing = torch.load(folder + "/batch.pt"), {}
for cls, part in ((ViTModel, "vit"), (ViTForImageClassification, "vit"), (ViTMAEForPreTraining, "mae")):
    model, report = cls.from_pretrained(folder + "/" + part, output_loading_info=True)
    missing[cls.__name__] = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if cls is ViTModel:
        tokens = model.eval()(batch["pixel_values"]).last_hidden_state
loss = model.eval()(**batch).loss
assert not any(name.startswith("hf_dbp") for name in sys.modules)
torch.save({"missing": missing, "tokens": tokens, "loss": loss}, folder + "/result.pt")
"""


@pytest.mark.slow
def test_fused_folders_load_where_hf_dbp_cannot_be_imported(mae_config: Maker, tmp_path: Path) -> None:
    model, batch = trained(mae_config()), inputs()
    model.save_pretrained(tmp_path / "run")
    vit = extract_vit(DBPViTMAEForPreTraining.from_pretrained(tmp_path / "run"))
    vit.save_pretrained(tmp_path / "vit")
    fuse(model).save_pretrained(tmp_path / "mae")
    torch.save(batch, tmp_path / "batch.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path)], check=False, capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")
    assert result["missing"] == {
        "ViTModel": (["pooler.dense.bias", "pooler.dense.weight"], []),
        "ViTForImageClassification": (["classifier.bias", "classifier.weight"], []),
        "ViTMAEForPreTraining": ([], []),
    }
    torch.testing.assert_close(result["tokens"], vit.eval()(batch["pixel_values"]).last_hidden_state)
    torch.testing.assert_close(result["loss"], model(**batch).loss)
    for part in ("vit", "mae"):
        text = (tmp_path / part / "config.json").read_text()
        assert "dbp" not in text
        assert "decorrelat" not in text
        assert not [name for name in tensors(tmp_path / part, "model.safetensors") if "decorrelation" in name]


CHOICES = ["none", "block_inputs", "encoder", "full"]


@pytest.mark.parametrize("there", CHOICES)
@pytest.mark.parametrize("wanted", CHOICES)
def test_another_choice_of_layers_keeps_the_function_and_every_R_that_stays(
    mae_config: Maker, tmp_path: Path, there: str, wanted: str
) -> None:
    model, batch = trained(mae_config(decorrelated_layers=there)), inputs()
    model.save_pretrained(tmp_path)
    loaded, info = DBPViTMAEForPreTraining.from_pretrained(
        tmp_path, decorrelated_layers=wanted, output_loading_info=True
    )
    loss = model(**batch).loss
    torch.testing.assert_close(loaded(**batch).loss, loss)
    assert (loaded.config.decorrelated_layers, loaded.training) == (wanted, False)
    old, new = (dict(decorrelated_layers(one)) for one in (model, loaded))
    for name, layer in new.items():
        R = layer.decorrelation.R
        assert torch.equal(R, old[name].decorrelation.R if name in old else torch.eye(len(R))), name
    changed = [{f"{name}.decorrelation.R" for name in a.keys() - b.keys()} for a, b in ((old, new), (new, old))]
    assert changed == [set(info["unexpected_keys"]), set(info["missing_keys"])]
    fresh = DBPViTMAEForPreTraining(mae_config(decorrelated_layers=wanted))
    assert (trainable(loaded), loaded.state_dict().keys()) == (trainable(fresh), fresh.state_dict().keys())


@pytest.mark.parametrize("wanted", [{"wide_blocks": 1}, {"wide_blocks": 4}, {"decorrelated_layers": "none"}])
@pytest.mark.parametrize("there", [1, 2, 4])
def test_other_blocks_keep_the_function_and_are_told(
    mae_config: Maker, tmp_path: Path, there: int, wanted: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(mae_config(wide_blocks=there))
    model.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        loaded, info = DBPViTMAEForPreTraining.from_pretrained(tmp_path, **wanted, output_loading_info=True)
    batch = inputs()
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)
    old, new = (dict(decorrelated_layers(one)) for one in (model, loaded))
    changed = {name for name in new if wanted["wide_blocks"] != there and name.endswith("fc2")}
    for name, layer in new.items():
        fresh = Decorrelation(layer.decorrelation.num_features, blocks=loaded.config.wide_blocks)
        expected = fresh if name in changed else old[name].decorrelation
        assert torch.equal(layer.decorrelation.R, expected.R), name
    assert set(info["missing_keys"]) == {f"{name}.decorrelation.R" for name in changed}
    assert ("R of 2 layers gets" in caplog.text) == bool(changed)
    if new:
        loaded.train()(**batch)
        assert update_decorrelation(loaded, eta=0.1).keys() == new.keys()


def test_weights_with_R_are_saved_under_their_own_name_alone(mae_config: Maker, tmp_path: Path) -> None:
    model = trained(mae_config())
    for variant in (None, "fp16"):
        with pytest.raises(ValueError, match="weights with R are saved only as 'unfused'"):
            model.save_pretrained(tmp_path, variant=variant)
    assert not list(tmp_path.iterdir())
    plain = trained(mae_config(decorrelated_layers="none"))
    plain.save_pretrained(tmp_path, variant=None)
    assert tensors(tmp_path, "model.safetensors").keys() == plain.state_dict().keys()

"""Models of strangers: no code of theirs runs, no memory is taken for absurd sizes, every mistake is one line."""

import json
import os
import pickle
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretraining import flags
from transformers import AutoConfig, ViTConfig, ViTModel

from hf_dbp import DBPViTMAEForPreTraining, load_fused_vit
from hf_dbp.config_limits import check_fields
from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.downstream.encoder import load_vit
from hf_dbp.downstream.segmentation.finetuning import main as finetune
from hf_dbp.hub.untrusted import check_memory, load_model, read_statistics
from hf_dbp.pretraining import build_model, main
from hf_dbp.training.arguments import ModelArguments


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def ours(tmp_path, mae_config):
    DBPViTMAEForPreTraining(mae_config()).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def vit(tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def warm_start(folder, **fields):
    return build_model(ModelArguments(model_name_or_path=str(folder), image_size=[48], **fields), 3, seed=0)


def same_size(folder, **fields):
    return build_model(ModelArguments(model_name_or_path=str(folder), image_size=[32], **fields), 3, seed=0)


LOADERS = {"load_fused_vit": load_fused_vit, "warm start": warm_start, "start": same_size}


def change(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


ABSURD = {
    "hidden_size": [10**9, -24, 0, "24", 24.0, True, None, [24], float("nan")],
    "num_hidden_layers": [10**7],
    "intermediate_size": [10**12],
    "num_attention_heads": [7, 10**6],
    "image_size": [10**9, [32, 32, 32], [], "32", 33, [32, 10**9]],
    "patch_size": [0, -8, 2**20, [8, 8]],
    "num_channels": [10**9],
    "layer_norm_eps": ["tiny", float("nan"), -1],
    "mask_ratio": [float("inf"), 1.5],
    "hidden_act": ["__import__('os')", 5, ["gelu"]],
    "dtype": ["os", 5],
    "num_labels": [10**12],
    "qkv_bias": ["yes"],
    "decorrelated_layers": ["all", ["full"]],
    "wide_blocks": [0, 5, "4"],
}
CASES = [(field, value) for field, values in ABSURD.items() for value in values]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("field", "value"), CASES)
def test_absurd_configurations_are_refused_by_name(ours, vit, field, value):
    change(ours, **{field: value})
    change(vit, **{field: value})
    name = field.replace("image_size", "image.size")
    for load in (*LOADERS.values(), AutoConfig.from_pretrained, DBPViTMAEConfig.from_pretrained):
        with pytest.raises(ValueError, match=name) as refused:
            load(ours)
        assert "\n" not in str(refused.value)
    if field not in ("mask_ratio", "decorrelated_layers", "wide_blocks"):  # which a ViT has not: they have no effect
        with pytest.raises(ValueError, match=name):
            load_vit(str(vit))


def test_each_size_may_be_possible_and_all_together_not(mae_config):
    sizes = {"hidden_size": 2**15, "num_attention_heads": 16, "num_hidden_layers": 1000}
    with pytest.raises(ValueError, match=r"it has 4.\de\+12 parameters; expected at most 3.4e\+10"):
        check_fields(sizes)
    with pytest.raises(ValueError, match=r"patches of 1 pixels"):
        check_fields({"image_size": 2**16, "patch_size": 1})
    with pytest.raises(ValueError, match=r"the model takes \d+ GiB, but this machine has \d+ GiB"):
        check_memory({"hidden_size": 2**15, "intermediate_size": 2**17, "num_hidden_layers": 10**6}, "it")
    check_memory(mae_config().to_dict(), "it")


def test_flags_are_held_to_the_same_limits(tmp_path, capsys):
    for changed in (
        {"config_overrides": "hidden_size=1000000000"},
        {"config_overrides": "hidden_size=128.5"},
        {"config_overrides": "num_hidden_layers=10000000"},
        {"image_size": 8 * 10**8},
        {"patch_size": 0},
    ):
        with pytest.raises(SystemExit) as stop:
            main(flags(tmp_path / "run", **changed))
        assert stop.value.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "kind", ["not JSON", "a list", "nested", "no type", pytest.param("code", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_what_is_no_configuration_is_refused(ours, kind, load):
    content = {
        "not JSON": "{",
        "a list": "[]",
        "nested": "[" * 100_000,
        "no type": "{}",
        "code": json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.E", "AutoModel": "evil.E"}}),
    }
    (ours / "config.json").write_text(content[kind])
    (ours / "evil.py").write_text(f"open({str(ours / 'ran')!r}, 'w')\nE = 1\n")
    with pytest.raises(ValueError, match=r"config\.json|'evil' model") as refused:
        load(ours)
    assert "\n" not in str(refused.value) and not (ours / "ran").exists()


def test_nothing_in_a_configuration_names_code(ours, vit):
    """Kernels, quantizers and remote classes in config.json have no effect on what is loaded."""
    hostile = {
        "auto_map": {"AutoConfig": "evil.E", "AutoModelForPreTraining": "evil.E", "AutoModel": "evil.E"},
        "attn_implementation": "evil/kernels",
        "_attn_implementation": "evil/kernels",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "base_model_tp_plan": {"*": "evil"},
        "num_labels": 3,
    }
    for folder, load in ((ours, load_fused_vit), (ours, warm_start), (ours, same_size), (vit, load_vit)):
        change(folder, **hostile)
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nE = 1\n")
        model = load(str(folder))
        assert model.config._attn_implementation in ("sdpa", "eager") and not hasattr(model, "hf_quantizer")
        assert not (folder / "ran").exists()


def damaged(folder, how):
    file = next(folder.glob("*.safetensors"))
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    if how == "truncated":
        file.write_bytes(content[:-100])
    elif how == "header":
        file.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    elif how == "offsets":
        name = next(key for key in header if key != "__metadata__")
        header[name]["shape"] = [10**6, 10**6]
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + struct.unpack("<Q", content[:8])[0] :])
    elif how == "text":
        file.write_text("see attached")
    else:
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(("fc1.weight", "intermediate.dense.weight")))
        tensors[name] = torch.zeros(3, 3)
        if how == "missing":
            del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("how", ["truncated", "header", "offsets", "text", "shape", "missing"])
def test_weights_that_lie_are_refused_by_name(ours, vit, how):
    named = {ours: damaged(ours, how), vit: damaged(vit, how)}
    for folder, load in ((ours, load_fused_vit), (ours, warm_start), (ours, same_size), (vit, load_vit)):
        with pytest.raises(ValueError) as refused:
            load(str(folder))
        message = str(refused.value)
        assert "\n" not in message
        if how in ("shape", "missing"):
            assert "fc1.weight" in message and str(folder) in message
        else:
            assert str(named[folder]) in message


def pickled(folder, name, target):
    """The safetensors replaced by a pickle that executes code."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with (folder / name).open("wb") as file:
        pickle.dump(Payload(target), file)
    torch.save({"weight": Payload(target)}, folder / f"{name}.zip")
    (folder / f"{name}.zip").replace(folder / name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.unfused.bin", "behind an index", "disguised"])
def test_pickles_are_refused_and_never_executed(ours, vit, tmp_path, name):
    target = tmp_path / "executed"
    for folder in (ours, vit):
        part = {"behind an index": "weights.bin", "disguised": "model.safetensors"}.get(name, name)
        if name == "disguised" and folder == ours:
            part = "model.unfused.safetensors"
        pickled(folder, part, target)
        if name == "behind an index":
            for index in ("model.safetensors.index.json", "model.safetensors.index.unfused.json"):
                (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"weight": part}}))
    for folder, load in ((ours, load_fused_vit), (ours, warm_start), (ours, same_size), (vit, load_vit)):
        with pytest.raises(
            ValueError, match=r"is a pickle|not a safetensors file|must map tensors to safetensors"
        ) as no:
            load(str(folder))
        assert "\n" not in str(no.value) and not target.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_the_states_of_a_resume_execute_nothing(tmp_path, name, capsys):
    run, target = tmp_path / "run", tmp_path / "executed"
    main(flags(run, num_train_epochs=1))
    checkpoint = run / "checkpoint-3"
    torch.save({"state": Payload(target)}, checkpoint / name)
    (checkpoint / "checkpoint.json").unlink(missing_ok=True)  # which has the sizes of the files
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(flags(run, num_train_epochs=2))
    assert stop.value.code == 2 and not target.exists()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: checkpoint ") and "more than tensors" in error and "checkpoint-3" in error


@pytest.mark.parametrize("run", ["pretrain", "finetune"])
@pytest.mark.parametrize("wrong", ["absent", "pickle", "absurd"])
@pytest.mark.slow
def test_scripts_end_with_one_line(ours, vit, tmp_path, capsys, run, wrong):
    folder = {"pretrain": ours, "finetune": vit}[run]
    if wrong == "pickle":
        pickled(folder, "pytorch_model.bin", tmp_path / "executed")
    elif wrong == "absurd":
        change(folder, hidden_size=10**9)
    name = tmp_path / "nowhere" if wrong == "absent" else folder
    data = ["--dataset_name", "wire_bonding", "--built_in_size", "32", "--report_to", "none", "--use_cpu"]
    data += ["--do_train"]
    with pytest.raises(SystemExit) as stop:
        (main if run == "pretrain" else finetune)(
            [*data, "--model_name_or_path", str(name), "--output_dir", str(tmp_path / "run")]
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and str(name) in error
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("mean", ["0.5", [], ["a"], [float("nan")] * 3, {"r": 1}, None, [0.5] * 2])
def test_statistics_of_an_image_processor_are_numbers(tmp_path, mean):
    assert read_statistics(tmp_path) is None
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": mean, "image_std": [0.5] * 3}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: image_"):
        read_statistics(tmp_path)
    file.write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    assert read_statistics(tmp_path) == ([0.1] * 3, [0.2] * 3)


def test_a_token_is_in_no_file_and_no_line(tmp_path, capsys, caplog):
    token = "hf_" + "SECRETsecret" * 3
    run = tmp_path / "run"
    main(flags(run, num_train_epochs=1, token=token, hub_token=token))
    output = capsys.readouterr()
    assert token not in output.out + output.err + caplog.text
    files = [file for file in Path(run).rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if token.encode() in file.read_bytes()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("flag", "refusal"),
    [("train_dir", "none of the 3 images can be read"), ("dataset_name", "Dataset scripts are no longer supported")],
)
def test_the_loading_script_of_a_data_set_never_runs(tmp_path, flag, refusal, streaming):
    """A folder of one's own is walked for images and shards; a data set by name is refused."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    pq.write_table(pa.table({"image": [b"image"] * 4}), folder / "train.parquet")
    with pytest.raises(ValueError, match=refusal):
        load_images(ImageSource(**{flag: str(folder)}, streaming=streaming))
    assert not (tmp_path / "ran").exists()


def test_only_three_kinds_of_models_are_loaded(ours):
    with pytest.raises(ValueError, match="holds a 'dbp_vit_mae' model, not 'vit'"):
        load_model(ours, "vit")

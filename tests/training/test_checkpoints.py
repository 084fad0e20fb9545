"""One call from any checkpoint to a fused model: finished and unfinished runs, shards, bfloat16."""

import shutil

import pytest
import torch
from test_pretraining import flags
from transformers import Dinov2Model, ViTModel

from hf_dbp import DBPViTMAEForPreTraining, decorrelated_layers, extract_vit, load_fused_vit
from hf_dbp.fusing import main as fuse_main
from hf_dbp.pretraining import main
from hf_dbp.training import saving
from hf_dbp.training.checkpoints import model_folder


@pytest.fixture
def trained(mae_config):
    """A model whose every R is far from I."""
    model = DBPViTMAEForPreTraining(mae_config()).eval()
    with torch.no_grad():
        for _, layer in decorrelated_layers(model):
            layer.decorrelation.R.add_(torch.randn_like(layer.decorrelation.R) * 0.05)
    return model


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_shards(tmp_path, trained):
    trained.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(load_fused_vit(tmp_path).state_dict(), extract_vit(trained).state_dict())
    with pytest.raises(OSError, match="no file named"):
        ViTModel.from_pretrained(tmp_path)  # which would ignore R


def test_bfloat16_products_are_taken_in_float64(tmp_path, trained):
    trained.to(torch.bfloat16).save_pretrained(tmp_path)
    fused = load_fused_vit(tmp_path, dtype="auto")
    assert fused.dtype == load_fused_vit(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    loaded = DBPViTMAEForPreTraining.from_pretrained(tmp_path)
    weight, R = loaded.vit.layers[0].mlp.fc1.weight, loaded.vit.layers[0].mlp.fc1.decorrelation.R
    assert R.dtype == torch.float32
    exact = weight.double() @ R.double()
    assert torch.equal(fused.layers[0].mlp.fc1.weight, exact.to(torch.bfloat16))
    assert torch.equal(load_fused_vit(tmp_path).layers[0].mlp.fc1.weight, exact.float())


def test_an_unfinished_run_gives_its_best_checkpoint(tmp_path):
    """A learning rate ruins the model in the end; then the run is interrupted before its last save."""
    run = tmp_path / "run"
    record = main(flags(run, learning_rate=60.0, warmup_steps=1000, num_train_epochs=2))
    for file in run.iterdir():
        if file.is_file():
            file.unlink()
    best = run / f"checkpoint-{record.best['step']}"
    assert record.best["step"] < record.rows[-1]["step"]
    assert model_folder(run) == best
    assert same(load_fused_vit(run).state_dict(), load_fused_vit(best).state_dict())
    fuse_main([str(run), "--output_dir", str(tmp_path / "vit"), "--num_images", "2"])
    fused = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    assert same(fused.state_dict(), load_fused_vit(best).state_dict())
    assert {"run.json", "curves.png", "reconstruction.png"} <= {file.name for file in (tmp_path / "vit").iterdir()}
    fuse_main([str(run), "--output_dir", str(tmp_path / "dinov2"), "--num_images", "2", "--as", "dinov2"])
    pixels = torch.randn(1, fused.config.num_channels, fused.config.image_size, fused.config.image_size)
    dinov2 = Dinov2Model.from_pretrained(tmp_path / "dinov2").eval()
    states = fused.eval()(pixels).last_hidden_state
    torch.testing.assert_close(dinov2(pixels).last_hidden_state, states, rtol=1e-5, atol=1e-5)
    assert "Dinov2Model.from_pretrained" in (tmp_path / "dinov2" / "README.md").read_text()
    (best / "trainer_state.json").unlink()  # as if cut off while it was written
    assert model_folder(run) == run / f"checkpoint-{record.rows[-1]['step']}"
    for checkpoint in run.iterdir():
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="holds no model; give the output folder of a run"):
        model_folder(run)


def test_bfloat16_runs_are_fused_in_float32(tmp_path):
    run = tmp_path / "run"
    main(flags(run, num_train_epochs=1))
    DBPViTMAEForPreTraining.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(run)
    fuse_main([str(run), "--output_dir", str(tmp_path / "vit"), "--num_images", "2"])
    written = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    assert written.dtype == torch.float32
    assert same(written.state_dict(), load_fused_vit(run).state_dict())
    (run / "run.json").unlink()
    with pytest.raises(SystemExit):
        fuse_main([str(run), "--output_dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_a_model_takes_the_place_of_an_earlier_one_whole_or_not_at_all(tmp_path, trained, monkeypatch):
    """No shard of an earlier save stays; an interruption while a model is written leaves the earlier one."""
    run, fused = tmp_path / "run", tmp_path / "fused"
    record = main(flags(run, num_train_epochs=1))
    extract_vit(trained).save_pretrained(fused, max_shard_size="20KB")
    (fused / "mine.txt").write_text("stays")
    before = {file.name: file.read_bytes() for file in fused.iterdir()}
    monkeypatch.setattr("hf_dbp.fusing.write_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuse_main([str(run), "--output_dir", str(fused), "--num_images", "2"])
    assert {file.name: file.read_bytes() for file in fused.iterdir()} == before
    monkeypatch.undo()
    fuse_main([str(run), "--output_dir", str(fused), "--num_images", "2"])
    assert [file.name for file in fused.glob("*safetensors*")] == ["model.safetensors"]
    assert (fused / "mine.txt").is_file()
    assert f'"{fused}"' in (fused / "README.md").read_text()
    assert same(ViTModel.from_pretrained(fused, add_pooling_layer=False).state_dict(), load_fused_vit(run).state_dict())
    trained.save_pretrained(run, max_shard_size="20KB")
    main(flags(run, num_train_epochs=1))  # saves its model once more
    assert [file.name for file in run.glob("*safetensors*")] == ["model.unfused.safetensors"]
    assert record.results["finished"]
    with pytest.raises(SystemExit):
        fuse_main([str(fused), "--output_dir", str(run)])  # no place for it


def test_a_move_that_breaks_off_leaves_no_model_made_of_two(tmp_path, trained, monkeypatch):
    for name, shard in (("old", "20KB"), ("new", "5GB")):
        trained.save_pretrained(tmp_path / name, max_shard_size=shard)
    monkeypatch.setattr(saving, "sync", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saving.move_files(tmp_path / "new", tmp_path / "old")
    with pytest.raises(ValueError, match="holds no model"):
        model_folder(tmp_path / "old")

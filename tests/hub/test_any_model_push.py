"""Any model that was decorrelated in a stock Trainer goes to the Hub: fused, it is the stock class without a trace."""

import json

import pytest
import torch
import zoo
from hub_models import TOKEN, ModelHub, run_commands
from loopback import hub_environment
from safetensors.torch import load


@pytest.mark.slow
def test_what_a_stock_trainer_pushes_loads_in_the_stock_class_and_fused_without_a_trace(tmp_path):
    with ModelHub() as hub:
        variables = hub_environment(hub.url, tmp_path / "home")
        (ended,) = run_commands([("hub.any_model_user", [tmp_path], TOKEN)], variables)
        assert ended.status == 0, ended.output
        unfused, fused = (hub.repositories[f"me/{name}"].files for name in ("unfused", "fused"))
    assert "model.safetensors" in unfused and "training_args.bin" in unfused
    assert set(fused) - {"README.md"} == {"config.json", "model.safetensors"}
    stock = zoo.bert()[0]
    stock.save_pretrained(tmp_path / "stock")
    plain = load((tmp_path / "stock" / "model.safetensors").read_bytes())
    pushed = load(fused["model.safetensors"])
    assert {name: (t.shape, t.dtype) for name, t in pushed.items()} == {
        name: (t.shape, t.dtype) for name, t in plain.items()
    }
    configs = [json.loads(text) for text in (fused["config.json"], (tmp_path / "stock" / "config.json").read_bytes())]
    assert configs[0] == configs[1] | {"use_cache": False}  # any Trainer switches it off
    assert not any(word in content for content in fused.values() for word in (b"decorrelation", b"hf_dbp"))
    own, *others = torch.load(tmp_path / "outputs.pt")
    for other in others:
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        load(unfused["model.safetensors"])["bert.encoder.layer.0.intermediate.dense.decorrelation.R"], torch.eye(16)
    )

"""Optimizers of the scripts: each trainable parameter once, R never, and two as one through schedule and checkpoint."""

import builtins
import copy
import random

import pytest
import torch
from test_callbacks import Regression
from torch.utils._pytree import tree_leaves

from hf_dbp.conversion import convert_to_decorrelated, decorrelated_layers
from hf_dbp.errors import UserError
from hf_dbp.training.optimizers import HiddenWithAdamW, check_optimizer, decay_groups, hidden_matrices

LIBRARY = ["soap", "kron"]
NAMES = ["muon", *LIBRARY]


@pytest.fixture(autouse=True)
def installed_and_seeded(request):
    torch.manual_seed(0)  # from some starts Kron diverges
    random.seed(0)
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("name") in LIBRARY:
        pytest.importorskip("pytorch_optimizer")


def gradients(model, batch):
    model(*batch)["loss"].backward()


def batch():
    return torch.randn(8, 6), torch.zeros(8, 1)


@pytest.mark.parametrize("name", ["adamw", *NAMES])
def test_optimizers_leave_r_alone(name):
    """No gradient, no group, no weight decay reaches R; every trainable parameter is in exactly one group."""
    model = convert_to_decorrelated(Regression())
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    if name == "adamw":
        optimizer = torch.optim.AdamW(decay_groups(named, 0.5), lr=0.1)
    else:
        optimizer = HiddenWithAdamW(model, name, lr=0.1, weight_decay=0.5)
        hidden = {id(p) for group in optimizer.hidden.param_groups for p in group["params"]}
        assert hidden == {id(p) for key, p in named if key in hidden_matrices(model)}
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for _, p in named)
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    for _ in range(2):  # SOAP's first step only looks
        gradients(model, batch())
        optimizer.step()
    for _, layer in decorrelated_layers(model):
        assert layer.decorrelation.R.grad is None
        assert torch.equal(layer.decorrelation.R, torch.eye(layer.decorrelation.num_features))


@pytest.mark.parametrize("name", NAMES)
def test_two_optimizers_are_scheduled_and_restored_as_one(name, tmp_path):
    models = [convert_to_decorrelated(Regression()) for _ in range(2)]
    optimizers = [HiddenWithAdamW(model, name, lr=0.1, weight_decay=0.1) for model in models]
    batches = [batch() for _ in range(24)]

    def train(which, some):
        for one in some:
            gradients(models[which], one)
            optimizers[which].step()
            optimizers[which].zero_grad()

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda epoch: 0.5**epoch)
    train(0, batches[:1])
    scheduler.step()
    groups = (*optimizers[0].hidden.param_groups, *optimizers[0].adamw.param_groups)
    assert {group["lr"] for group in groups} == {0.05}
    train(0, batches[1:11])  # past an update of SOAP's bases
    torch.save(optimizers[0].state_dict(), tmp_path / "optimizer.pt")
    optimizers[1].load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    for which in range(2):
        torch.manual_seed(0)  # Kron draws when to update; a Trainer restores the generators
        random.seed(0)
        train(which, batches[11:])
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_gradients_leaves_no_trace(name):
    model = convert_to_decorrelated(Regression())
    optimizer = HiddenWithAdamW(model, name, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        gradients(model, batch())
        optimizer.step()
    optimizer.zero_grad()
    before = tree_leaves(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
    optimizer.step()
    after = tree_leaves((model.state_dict(), optimizer.state_dict()))
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_an_unknown_optimizer_names_those_near_it():
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(UserError, match=r"--optimizer sopa: .* did you mean .*soap"):
        check_optimizer("sopa")


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pytorch_optimizer":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("adamw", "muon"):
        check_optimizer(name)
    with pytest.raises(UserError, match=r"pip install 'hf-dbp\[optimizers\]'"):
        check_optimizer("soap")

"""Swap, walk and fuse on trees that know nothing of DBP: an MLP and two transformers models with random weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from hf_dbp.conversion import all_linears, convert_to_decorrelated, decorrelated_layers, fuse, fused_state_dict
from hf_dbp.layers import DecorrelatedLinear, DecorrelatedPatchProjection


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Sequential(nn.Linear(9, 4, bias=False))), torch.randn(7, 6)


def bert() -> tuple[nn.Module, Tensor]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=50, **sizes)).eval(), torch.randint(50, (3, 8))


def dinov2() -> tuple[nn.Module, Tensor]:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    return Dinov2Model(config).eval(), torch.randn(2, 3, 16, 16)


def every_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) or "patch_embeddings" in name


def output(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return y if isinstance(y, Tensor) else y.last_hidden_state


TREES = pytest.mark.parametrize("tree", [mlp, bert, dinov2])


@TREES
def test_swap_at_identity_changes_nothing_to_the_bit(tree: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    plain, x = tree()
    swapped = copy.deepcopy(plain)
    assert convert_to_decorrelated(swapped, every_layer) is swapped
    names = [name for name, _ in plain.named_modules() if isinstance(plain.get_submodule(name), nn.Linear | nn.Conv2d)]
    assert [name for name, _ in decorrelated_layers(swapped)] == names
    trainable = {name: p for name, p in swapped.named_parameters() if p.requires_grad}
    assert trainable.keys() == dict(plain.named_parameters()).keys()
    assert torch.equal(output(plain, x), output(swapped, x))
    for module in (plain, swapped):
        output(module, x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        theirs, ours = parameter.grad, trainable[name].grad
        assert theirs is ours is None or torch.equal(theirs, ours), name


@TREES
def test_fusion_gives_the_plain_tree_back(tree: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    plain, x = tree()
    plain, x = plain.double(), x.double() if x.is_floating_point() else x
    swapped = convert_to_decorrelated(copy.deepcopy(plain), every_layer).double()
    for _, layer in decorrelated_layers(swapped):
        layer.decorrelation.R.add_(0.05 * torch.randn_like(layer.decorrelation.R))
    fused = fuse(swapped)
    assert type(fused) is type(plain)
    assert repr(fused) == repr(plain)
    assert fused.training == plain.training
    torch.testing.assert_close(output(fused, x), output(swapped, x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(output(fused, x), output(plain, x))
    plain.load_state_dict(fused_state_dict(swapped))
    assert torch.equal(output(fused, x), output(plain, x))
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in swapped.parameters()}


def test_the_predicate_chooses_by_name_and_swapped_layers_are_not_offered_again() -> None:
    module, _ = mlp()
    first = convert_to_decorrelated(module, lambda _, name: name == "2.0")[2][0]
    assert isinstance(first, DecorrelatedLinear)
    assert [name for name, _ in decorrelated_layers(module)] == ["2.0"]
    convert_to_decorrelated(module)
    assert [name for name, _ in decorrelated_layers(module)] == ["0", "2.0"]
    assert module[2][0] is first


def test_subclasses_compute_something_else_and_are_left_alone() -> None:
    module = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)  # its out_proj is never called
    assert [name for name, _ in decorrelated_layers(convert_to_decorrelated(module))] == ["linear1", "linear2"]


def test_a_layer_under_two_names_stays_one_layer() -> None:
    shared, x = nn.Linear(4, 4), torch.randn(3, 4)
    module = convert_to_decorrelated(nn.Sequential(shared, nn.ReLU(), shared))
    assert module[0] is module[2]
    module[0].decorrelation.R.add_(0.1)
    fused = fuse(module)
    assert fused[0] is fused[2]
    torch.testing.assert_close(fused(x), module(x))


def test_the_default_takes_linears_and_leaves_convolutions() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, kernel_size=3), nn.Flatten(), nn.Linear(4, 2))
    assert [name for name, _ in decorrelated_layers(convert_to_decorrelated(module))] == ["2"]
    assert not all_linears(module[0], "0")


def test_naive_reaches_every_layer() -> None:
    module, x = dinov2()
    plain = output(module, x)
    convert_to_decorrelated(module, every_layer, naive=True)
    assert all(layer.naive for _, layer in decorrelated_layers(module))  # type: ignore[attr-defined]
    torch.testing.assert_close(output(module, x), plain)


def test_a_layer_by_itself_is_walked_and_fused() -> None:
    layer = DecorrelatedLinear.from_linear(nn.Linear(3, 2))
    assert list(decorrelated_layers(layer)) == [("", layer)]
    assert fused_state_dict(layer).keys() == {"weight", "bias"}
    assert type(fuse(layer)) is nn.Linear
    patches = DecorrelatedPatchProjection.from_conv(nn.Conv2d(1, 2, kernel_size=2, stride=2))
    assert type(fuse(patches)) is nn.Conv2d


def test_state_dict_of_a_plain_tree_is_its_own() -> None:
    module, _ = mlp()
    assert fused_state_dict(module).keys() == module.state_dict().keys()


def test_refusals_name_the_layer_and_the_remedy() -> None:
    module, _ = mlp()
    with pytest.raises(ValueError, match="chose none of the linear layers of Sequential; print the names"):
        convert_to_decorrelated(module, lambda _, name: "attention" in name)
    with pytest.raises(ValueError, match=r"use DecorrelatedLinear\.from_linear"):
        convert_to_decorrelated(module[0])
    with pytest.raises(ValueError, match="Sequential has no decorrelated layer to fuse"):
        fuse(module)
    swapped = convert_to_decorrelated(module)
    swapped[2][0].decorrelation.R[0, 0] = torch.nan
    for fusing in (fuse, fused_state_dict):
        with pytest.raises(ValueError, match=r"^2\.0: .*non-finite"):
            fusing(swapped)


def test_a_refused_convolution_leaves_the_tree_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 3, kernel_size=3))
    with pytest.raises(ValueError, match=r"^1: .*stride = kernel size"):
        convert_to_decorrelated(module, lambda *_: True)
    assert not list(decorrelated_layers(module))

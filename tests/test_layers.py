"""Each layer compared with its plain layer, and what a forward pass keeps for the next update."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from hf_dbp.errors import UserError
from hf_dbp.layers import DecorrelatedLinear, DecorrelatedPatchProjection, Decorrelation, RowSampling
from hf_dbp.update import seed_sampling

ALL_ROWS = RowSampling(fraction=1.0)


def linear(
    bias: bool = True, dtype: torch.dtype = torch.float64, blocks: int = 1, naive: bool = False
) -> DecorrelatedLinear:
    return DecorrelatedLinear.from_linear(nn.Linear(6, 4, bias=bias, dtype=dtype), blocks=blocks, naive=naive)


def conv(**kwargs: bool) -> DecorrelatedPatchProjection:
    return DecorrelatedPatchProjection.from_conv(
        nn.Conv2d(2, 5, kernel_size=(4, 3), stride=(4, 3), dtype=torch.float64), **kwargs
    )


def perturb(layer: DecorrelatedLinear | DecorrelatedPatchProjection) -> None:
    """Give R another value, in the dtype of the weights, as a run would after many steps."""
    layer.double()
    layer.decorrelation.R.add_(0.1 * torch.randn_like(layer.decorrelation.R))


CASES = {
    "linear": (linear, (3, 7, 6)),
    "blocks": (functools.partial(linear, blocks=3), (3, 7, 6)),
    "conv": (conv, (3, 2, 9, 12)),  # 9 = 2 * 4 + 1: a margin the kernel ignores
}
#: how each is made of its plain layer
FROM_PLAIN = {
    "linear": DecorrelatedLinear.from_linear,
    "blocks": functools.partial(DecorrelatedLinear.from_linear, blocks=3),
    "conv": DecorrelatedPatchProjection.from_conv,
}


@pytest.mark.parametrize("case", CASES)
def test_adopts_the_parameters_and_changes_nothing_at_identity(case: str) -> None:
    make, shape = CASES[case]
    plain = make().fuse().float().eval()
    layer = FROM_PLAIN[case](plain)  # type: ignore[operator]
    assert not layer.training
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"weight", "bias"}
    x = torch.randn(shape, requires_grad=True)
    outputs = layer.train()(x), plain(x)
    assert torch.equal(*outputs)
    pull = torch.randn_like(outputs[0])
    ours, theirs = (torch.autograd.grad(y, (x, plain.weight, plain.bias), pull) for y in outputs)
    assert all(map(torch.equal, ours, theirs))


def test_blocks_are_square_matrices_that_divide_the_input() -> None:
    layer = linear(blocks=3)
    assert torch.equal(layer.decorrelation.R, torch.eye(2).repeat(3, 1, 1))
    assert layer.decorrelation.num_features == 6
    assert "R=3x2x2" in str(layer)
    for blocks in (0, 4, 12):
        with pytest.raises(UserError, match=f"blocks is {blocks}; expected a divisor of .* input features, 6"):
            linear(blocks=blocks)


@pytest.mark.parametrize("case", CASES)
def test_fused_naive_and_plain_forms_agree(case: str) -> None:
    make, shape = CASES[case]
    layer = make()
    perturb(layer)
    naive, plain = copy.deepcopy(layer), layer.fuse()
    naive.naive = True
    assert not any("decorrelation" in key for key in plain.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = [module(x) for module in (layer, naive, plain)]
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0], other, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(outputs[0])
    fused_grads, naive_grads = (
        torch.autograd.grad(y, (x, module.weight, module.bias), pull)
        for y, module in zip(outputs, (layer, naive), strict=False)
    )
    torch.testing.assert_close(fused_grads, naive_grads, rtol=1e-12, atol=1e-12)


def test_fuse_stores_the_weights_dtype_and_refuses_what_is_not_finite() -> None:
    layer = linear(dtype=torch.bfloat16, bias=False)
    layer.decorrelation.R.add_(0.1)
    fused = layer.fuse()
    exact = layer.weight.double() @ layer.decorrelation.R.double()
    assert torch.equal(fused.weight, exact.bfloat16())
    assert fused.bias is None
    layer.decorrelation.R[0, 0] = torch.inf
    with pytest.raises(ValueError, match="non-finite"):
        layer.fuse()


@pytest.mark.parametrize(
    "broken", [{"stride": 1}, {"groups": 2}, {"padding": 1}], ids=["overlapping", "grouped", "padded"]
)
def test_only_a_patch_projection_is_a_linear_layer(broken: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="stride = kernel size"):
        DecorrelatedPatchProjection.from_conv(nn.Conv2d(2, 4, kernel_size=4, **({"stride": 4} | broken)))


def test_what_the_linear_gathers_is_its_input_in_train_mode_only() -> None:
    layer, x = linear(), torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    layer.decorrelation.sampling = ALL_ROWS
    layer.eval()(x)
    layer.train().decorrelation.gathering = False
    layer(x)
    assert layer.decorrelation.rows is None
    layer.decorrelation.gathering = True
    layer(x), layer(2 * x)
    rows = layer.decorrelation.rows
    assert not rows.requires_grad  # type: ignore[attr-defined]
    assert torch.equal(rows, torch.cat([x, 2 * x]).detach().reshape(-1, 6))


def test_the_sampled_rows_are_input_rows_and_follow_the_key() -> None:
    layer, x = linear(), torch.arange(600, dtype=torch.float64).view(100, 6)
    drawn = []
    for step in (1, 1, 2):
        seed_sampling(layer, seed=3, step=step)
        layer.decorrelation.rows = None
        layer(x)
        assert torch.equal(layer.decorrelation.rows, x[layer.decorrelation.rows[:, 0].long() // 6])
        drawn.append(layer.decorrelation.rows)
    assert len(drawn[0]) == 10
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_each_micro_batch_draws_rows_of_its_own_once(reentrant: bool | None) -> None:
    """The forward that gradient checkpointing repeats draws none; the same seed gives the same draws."""
    x = torch.arange(600, dtype=torch.float64).view(100, 6).requires_grad_()
    runs = []
    for checkpointed in (reentrant is not None, False):
        layer = linear()
        seed_sampling(layer, seed=3, step=1)
        for _ in range(3):
            call = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=reentrant)
            (call if checkpointed else layer)(x).sum().backward()
        runs.append(layer.decorrelation.rows)
    first, second, third = runs[0].split(10)
    assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(first, third)
    assert torch.equal(*runs)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_gathered_patches_are_the_inputs_of_the_flattened_kernel(fraction: float) -> None:
    layer, pixels = conv(), torch.randn(3, 2, 9, 12, dtype=torch.float64)
    layer.decorrelation.sampling = RowSampling(fraction=fraction)
    y = layer(pixels).flatten(2).transpose(1, 2).reshape(-1, 5)
    rows = layer.decorrelation.rows
    assert rows.shape == (round(24 * fraction), 24)
    from_rows = rows @ layer.weight.flatten(1).T + layer.bias
    distances = torch.cdist(from_rows, y)
    assert (distances.min(1).values < 1e-10).all()
    if fraction == 1:
        torch.testing.assert_close(from_rows, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_rows_once(reentrant: bool) -> None:
    layer, x = linear(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    layer.decorrelation.sampling = ALL_ROWS
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(layer.decorrelation.rows, x.detach())


def test_a_layer_copies_and_pickles_in_the_middle_of_a_step() -> None:
    layer = linear()
    seed_sampling(layer, seed=0, step=5)
    layer(torch.randn(100, 6, dtype=torch.float64, requires_grad=True)).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.decorrelation.rows, layer.decorrelation.rows)
        assert torch.equal(twin.decorrelation.key, layer.decorrelation.key)
        assert torch.equal(twin.decorrelation.R, layer.decorrelation.R)
        assert not twin.decorrelation.R.requires_grad


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()])
def test_no_cast_takes_R_below_float32(cast) -> None:
    layer = linear()
    exact = layer.decorrelation.R.add_(1e-6).clone()
    cast(layer)
    assert layer.weight.dtype != torch.float64
    assert layer.decorrelation.R.dtype == torch.float32
    assert torch.equal(layer.decorrelation.R, exact)
    assert layer.double().decorrelation.R.dtype == torch.float64


def test_R_rows_and_key_move_together() -> None:
    layer = linear()
    seed_sampling(layer, seed=0, step=0)
    layer(torch.randn(20, 6, dtype=torch.float64))
    layer.to("meta")
    assert {t.device.type for t in (layer.decorrelation.R, layer.decorrelation.rows, layer.decorrelation.key)} == {
        "meta"
    }


def test_plain_bf16_works_outside_autocast() -> None:
    layer = linear().to(torch.bfloat16)
    y = layer(torch.randn(20, 6, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == layer.weight.grad.dtype == layer.decorrelation.rows.dtype == torch.bfloat16


def test_reset_restores_the_identity() -> None:
    decorrelation = Decorrelation(5)
    decorrelation.R.add_(1)
    decorrelation.reset_parameters()
    assert torch.equal(decorrelation.R, torch.eye(5))


def test_print_shows_what_is_decorrelated() -> None:
    assert "DecorrelatedLinear(\n  in_features=6, out_features=4, bias=True, form=naive" in repr(linear(naive=True))
    assert "(decorrelation): Decorrelation(R=24x24)" in repr(conv())


@pytest.mark.parametrize(
    ("sampling", "num_rows", "expected"),
    [
        (RowSampling(), 1000, 100),
        (RowSampling(), 4, 1),  # never none
        (RowSampling(fraction=1.0), 1000, 1000),
        (RowSampling(floor=2.0), 1000, 128),  # 2 D of 64 features
        (RowSampling(floor=2.0), 100, 100),  # ... where the batch has them
        (RowSampling(floor=2.0, shares=3), 1000, 100),  # ceil(128 / 3) = 43 of each forward: the fraction gives more
        (RowSampling(floor=2.0, shares=3), 100, 43),
        (RowSampling(cap=1.0), 1000, 64),
        (RowSampling(cap=1.0, shares=3), 1000, 21),
        (RowSampling(floor=0.5, cap=1.0), 400, 40),
    ],
)
def test_sample_size(sampling: RowSampling, num_rows: int, expected: int) -> None:
    assert sampling.num_samples(num_rows, 64) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fraction": 0.0}, r"\(0, 1\], got 0.0"),
        ({"fraction": 1.5}, r"\(0, 1\], got 1.5"),
        ({"fraction": float("nan")}, r"\(0, 1\]"),
        ({"floor": -1.0}, "floor is a positive multiple"),
        ({"cap": 0.0}, "cap is a positive multiple"),
        ({"floor": 3.0, "cap": 2.0}, "must not exceed the row cap"),
        ({"shares": 0}, "shares"),
    ],
)
def test_row_sampling_refuses(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowSampling(**wrong)


def test_R_gets_no_gradient_and_no_weight_decay() -> None:
    layer = linear()
    before = layer.decorrelation.R.clone()
    trainable = [p for p in layer.parameters() if p.requires_grad]
    assert not any(p is layer.decorrelation.R for p in trainable)
    for parameters in (trainable, layer.parameters()):  # the second as a careless loop would
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
        layer(torch.randn(9, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
    assert layer.decorrelation.R.grad is None
    assert torch.equal(layer.decorrelation.R, before)

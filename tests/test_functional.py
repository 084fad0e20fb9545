"""The mathematics against formulas written out by hand, in float64 wherever a rounding could hide a slip."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_dbp.functional import (
    covariance_sums,
    decorrelated_linear,
    decorrelation_metrics,
    decorrelation_step_,
    fused_weight,
    largest_eigenvalue,
    layer_weight,
    sample_rows,
    second_moment_sums,
    step_share,
)


def near_identity(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.eye(shape[-1], dtype=dtype) + 0.1 * torch.randn(*shape, shape[-1], dtype=dtype)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_fused_is_naive_in_outputs_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    R, x, W = near_identity(6), double(*shape, 6).requires_grad_(), double(4, 6).requires_grad_()
    leaves = (x, W, double(4).requires_grad_()) if bias else (x, W)
    outputs = [decorrelated_linear(*(*leaves, None)[:3], R, naive=naive) for naive in (False, True)]  # type: ignore[misc]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(outputs[0])
    fused, naive = (torch.autograd.grad(y, leaves, pull) for y in outputs)
    torch.testing.assert_close(fused, naive, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("naive", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_a_block_diagonal_R_is_its_full_matrix_in_outputs_and_gradients(shape: tuple[int, ...], naive: bool) -> None:
    R, x, W = near_identity(3, 4), double(*shape, 12).requires_grad_(), double(5, 12).requires_grad_()
    full = torch.block_diag(*R)  # type: ignore[no-untyped-call]
    outputs = decorrelated_linear(x, W, None, R, naive=naive), x @ (W @ full).T
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, W), pull) for y in outputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused_weight(W, R), W @ full, rtol=1e-12, atol=1e-12)


def test_a_block_diagonal_R_rounds_under_autocast_as_its_full_matrix() -> None:
    R, W = near_identity(4, 16, dtype=torch.float32), torch.randn(8, 64)
    full = torch.block_diag(*R)  # type: ignore[no-untyped-call]
    with torch.autocast("cpu", torch.bfloat16):
        for product in (fused_weight, layer_weight):
            ours, theirs = product(W, R), product(W, full)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)


def test_fused_weight_has_no_gradient_for_R_and_the_right_one_for_W() -> None:
    R, W, x = near_identity(6).requires_grad_(), double(4, 6).requires_grad_(), double(3, 6)
    pull = double(4, 6)
    (grad,) = torch.autograd.grad(fused_weight(W, R), W, pull)
    torch.testing.assert_close(grad, pull @ R.T, rtol=1e-12, atol=1e-12)
    for naive in (False, True):
        decorrelated_linear(x, W, None, R, naive=naive).sum().backward()
    assert R.grad is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_leaves_the_weight_as_it_is_to_the_bit(dtype: torch.dtype, autocast: bool) -> None:
    W = torch.randn(5, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        A = fused_weight(W, torch.eye(8))
    assert A.dtype == torch.float32
    assert torch.equal(A, W.float())


def test_autocast_rounds_only_the_correction() -> None:
    """The stated precision: |A - W R| <= 2**-7 |W| |R - I| entry by entry, and the same for the gradient."""
    R, W = near_identity(64, dtype=torch.float32), torch.randn(32, 64, requires_grad=True)
    pull = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        A = fused_weight(W, R)
        (grad,) = torch.autograd.grad(A, W, pull)
    off = (R - torch.eye(64)).abs()
    exact = W.detach().double() @ R.double()
    assert ((A.double() - exact).abs() <= 2**-7 * (W.abs() @ off)).all()
    assert ((grad.double() - pull.double() @ R.double().T).abs() <= 2**-7 * (pull.abs() @ off.T)).all()
    assert A.dtype == grad.dtype == torch.float32


@pytest.mark.parametrize("R", [torch.eye(8), torch.eye(4).repeat(2, 1, 1)], ids=["full", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_with_the_plain_weight_at_the_identity(dtype: torch.dtype, R: Tensor) -> None:
    W = torch.randn(5, 8, dtype=dtype)
    assert torch.equal(layer_weight(W, R), W)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer_weight(W, R), W.bfloat16())


def test_a_layers_weight_under_autocast_is_rounded_twice() -> None:
    """|A - W R| <= 2**-8 (2 |W| + 3 |W| |R - I|) entry by entry, so R - I is not lost; its gradient likewise."""
    R, W = near_identity(64, dtype=torch.float32), torch.randn(32, 64, requires_grad=True)
    pull = torch.randn(32, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        A = layer_weight(W, R)
        (grad,) = torch.autograd.grad(A, W, pull)
    off = (R - torch.eye(64)).abs()
    exact = W.detach().double() @ R.double()
    assert ((A.double() - exact).abs() <= 2**-8 * (2 * W.abs() + 3 * W.abs() @ off)).all()
    gradient = pull.double() @ R.double().T
    assert ((grad.double() - gradient).abs() <= 2**-8 * (2 * pull.abs() + 3 * pull.abs().float() @ off.T)).all()
    assert (A.dtype, grad.dtype) == (torch.bfloat16, torch.float32)
    change = (A.detach().double() - W.detach().bfloat16().double()).norm()
    assert change.item() == pytest.approx(float((exact - W.detach().double()).norm()), rel=0.1)


def test_an_ensemble_by_vmap_multiplies_as_its_members_do() -> None:
    W, R = torch.randn(3, 4, 6), torch.stack([near_identity(6, dtype=torch.float32) for _ in range(3)])
    with torch.autocast("cpu", torch.bfloat16):
        together = torch.vmap(layer_weight)(W, R)
        alone = torch.stack([layer_weight(*pair) for pair in zip(W, R, strict=True)])
    torch.testing.assert_close(together, alone, rtol=2**-7, atol=2**-7)  # a batched product rounds in another order


def hand_step(x: Tensor, R: Tensor, eta: float, kappa: float) -> Tensor:
    """R - eta C R with z, C and their product written out (paper eq. 4, 5; the whitening term multiplies rows)."""
    z = torch.stack([R @ row for row in x])
    second = sum(torch.outer(row, row) for row in z) / len(z)
    off = second - torch.diag(second.diag())
    whitening = torch.diag(second.diag() - 1)
    return R - eta * ((1 - kappa) * off + kappa * whitening) @ R


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [3, 6, 40])
def test_step_is_the_formula(rows: int, kappa: float) -> None:
    x, R, eta = double(2, rows, 6), near_identity(2, 6), 0.05
    by_hand = torch.stack([hand_step(*pair, eta, kappa) for pair in zip(x, R, strict=True)])
    zzR, zz, _ = covariance_sums(x, R)
    stepped = decorrelation_step_(R, zzR, zz, torch.tensor(rows, dtype=x.dtype), eta=eta, kappa=kappa)
    assert stepped is R
    torch.testing.assert_close(stepped, by_hand, rtol=1e-12, atol=1e-12)


def test_sums_over_parts_add_up_to_the_sums_over_all() -> None:
    x, R = double(20, 6), near_identity(6)
    parts = [covariance_sums(part, R) for part in x.split(4)]  # 4 rows < 6 features < 20 rows
    whole = covariance_sums(x, R)
    *parts, largest = zip(*parts, strict=True)
    assert whole[2] <= sum(largest)  # a bound
    for part_sums, total in zip(parts, whole[:2], strict=True):
        torch.testing.assert_close(sum(part_sums), total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_repeated_steps_make_the_covariance_diagonal(kappa: float) -> None:
    x, R = double(500, 6) @ double(6, 6) / 2, torch.eye(6, dtype=torch.float64)
    x = x / x.square().mean().sqrt()
    before, _ = decorrelation_metrics(x.T @ x / len(x))
    for _ in range(4000):
        decorrelation_step_(R, *covariance_sums(x, R)[:2], torch.tensor(len(x), dtype=x.dtype), eta=0.1, kappa=kappa)
    second = second_moment_sums(x, R)[0] / len(x)
    torch.testing.assert_close(second, (x @ R.T).T @ (x @ R.T) / len(x), rtol=1e-12, atol=1e-12)
    after, correlation = decorrelation_metrics(second)
    assert after < 1e-12 * before
    assert correlation < 1e-12
    if kappa:
        torch.testing.assert_close(second, torch.eye(6, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_metrics_are_the_formulas() -> None:
    z = double(30, 5) @ double(5, 5)
    second = z.T @ z / 30
    loss, correlation = decorrelation_metrics(second)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    assert loss.item() == pytest.approx(sum(second[i, j].item() ** 2 for i, j in pairs) / 25)
    by_hand = sum((second[i, j] ** 2 / (second[i, i] * second[j, j])).item() for i, j in pairs) / 20
    assert correlation.item() == pytest.approx(by_hand)


def test_a_change_of_scale_moves_the_loss_and_not_the_correlation() -> None:
    z = double(30, 5) @ double(5, 5)
    second = z.T @ z / 30
    scale = double(5).exp()
    loss, correlation = decorrelation_metrics(torch.stack([second, second * scale[:, None] * scale]))
    assert loss[0] != pytest.approx(loss[1].item(), rel=1e-3)
    assert correlation[0].item() == pytest.approx(correlation[1].item())


def test_metrics_of_a_dead_feature_and_of_a_single_feature() -> None:
    loss, correlation = decorrelation_metrics(torch.diag(torch.tensor([2.0, 0.0, 1.0])))
    assert (loss.item(), correlation.item()) == (0, 0)
    assert [value.item() for value in decorrelation_metrics(torch.ones(1, 1))] == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1), st.integers(-(2**62), 2**62))
def test_sampled_rows_are_distinct_and_exist(num_rows: int, share: float, key: int) -> None:
    count = max(1, round(share * num_rows))
    rows = sample_rows(num_rows, count, torch.tensor(key))
    assert rows.shape == (count,)
    assert rows.min() >= 0
    assert rows.max() < num_rows
    assert rows.unique().numel() == count


@pytest.mark.parametrize(("num_rows", "count"), [(40, 4), (40, 30), (37, 11)])
def test_every_row_has_the_same_chance(num_rows: int, count: int) -> None:
    """Chi-square of the counts over many keys, at four standard deviations above its mean (an upper bound here)."""
    draws = 6000
    drawn = torch.vmap(lambda key: sample_rows(num_rows, count, key))(torch.arange(draws))
    counts, expected = drawn.flatten().bincount(minlength=num_rows).double(), draws * count / num_rows
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square < num_rows + 4 * math.sqrt(2 * num_rows)


def test_pairs_of_rows_meet_as_chance_has_it() -> None:
    """No two strata move together: the joint counts of two rows' inclusion stay within five standard deviations."""
    num_rows, count, draws = 24, 6, 6000
    drawn = torch.vmap(lambda key: sample_rows(num_rows, count, key))(torch.arange(draws) * 2**40)
    chosen = torch.zeros(draws, num_rows, dtype=torch.float64).scatter_(1, drawn, 1.0)
    joint = chosen.T @ chosen / draws
    apart = torch.arange(num_rows)[:, None] - torch.arange(num_rows)
    apart = torch.minimum(apart.abs(), num_rows - apart.abs())
    far = joint[apart >= 2 * num_rows // count]  # never in one stratum
    chance = (count / num_rows) ** 2
    assert (far - chance).abs().max() < 5 * math.sqrt(chance * (1 - chance) / draws)


def test_another_key_draws_other_rows_and_the_same_key_the_same() -> None:
    draws = [sample_rows(1000, 100, torch.tensor(key)) for key in (1, 1, 2, 1 + 2**40)]
    assert torch.equal(draws[0], draws[1])
    shared = [len(set(draws[0].tolist()) & set(other.tolist())) for other in draws[2:]]
    assert max(shared) < 30  # 10 expected by chance


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_largest_eigenvalue_is_never_exceeded_and_mostly_found(scale: float) -> None:
    """Noise, a dominant direction, a mean; more rows than features, and fewer. At least half of it is found, and nine
    tenths where it is four times the next."""
    separate = 0
    for _ in range(300):
        rows, features = torch.randint(2, 60, (2,)).tolist()
        direction = torch.nn.functional.normalize(double(features), dim=0)
        outlier, mean = 10 * torch.rand(()) * double(rows, 1), 5 * torch.randint(2, ()) * double(())
        z = scale * (double(rows, features) + outlier * direction + mean)
        true = torch.linalg.eigvalsh(z.T @ z)
        found = largest_eigenvalue(torch.stack([z, 2 * z])) / true[-1] / torch.tensor([1, 4])
        assert (found <= 1 + 1e-9).all()
        separate += (stands_out := true[-1] > 4 * true[-2])
        assert (found > (0.9 if stands_out else 0.5)).all(), (rows, features)
    assert 100 < separate < 250


def test_rows_without_any_size_or_of_any_kind_have_a_largest_eigenvalue() -> None:
    alternating = torch.tensor([1.0, -1.0]).repeat(20).unsqueeze(-1).expand(40, 8)
    for z, true in ((torch.zeros(5, 8), 0.0), (torch.ones(40, 8), 320.0), (alternating, 320.0)):
        assert largest_eigenvalue(z).item() == pytest.approx(true)
    assert not largest_eigenvalue(torch.full((5, 8), math.nan)).isfinite()


def test_the_share_is_what_is_stable() -> None:
    finite, eta = torch.ones(7, 2, 2), 0.1
    finite[5, 0, 1], finite[6, 1, 1] = math.nan, 1e30
    largest = torch.tensor([0.0, 99.0, 100.0, 400.0, math.nan, 1.0, 1.0])
    count = torch.full((7,), 10.0)
    assert step_share(finite, largest, count, eta=eta).tolist() == [1.0, 1.0, 1.0, 0.25, 0.0, 0.0, 0.0]
    assert step_share(finite, largest, count, eta=0.0).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert step_share(finite, None, count, eta=eta).tolist() == [1.0] * 5 + [0.0] * 2


def test_a_share_scales_the_step_and_none_leaves_r_to_the_bit() -> None:
    x, R = double(3, 8, 6), near_identity(3, 6)
    sums = covariance_sums(x, R)[:2]
    sums[0][2], sums[1][2] = math.nan, math.inf
    share, count = torch.tensor([1.0, 0.25, 0.0], dtype=x.dtype), torch.full((3,), 8.0, dtype=x.dtype)
    stepped = decorrelation_step_(R.clone(), *sums, count, eta=0.1, kappa=0.3, share=share)
    for k, eta in enumerate((0.1, 0.025, 0.0)):
        torch.testing.assert_close(stepped[k], hand_step(x[k], R[k], eta, 0.3), rtol=1e-12, atol=1e-12)
    assert torch.equal(stepped[2], R[2])

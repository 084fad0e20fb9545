"""One update against the formula by hand, its bookkeeping over micro-batches, steps and processes."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_dbp.update
from hf_dbp.conversion import convert_to_decorrelated, decorrelated_layers
from hf_dbp.functional import decorrelation_metrics, sample_rows
from hf_dbp.layers import DecorrelatedLinear, JointDraws, RowSampling
from hf_dbp.update import (
    configure_sampling,
    discard_rows,
    measure_decorrelation,
    seed_sampling,
    set_gathering,
    tf32_products,
    update_decorrelation,
)


def model(fraction: float = 1.0) -> nn.Sequential:
    """Widths 6, 6, 9, 6 and 5, so that some layers share a batched product; float64."""
    widths = (6, 6, 9, 6, 5, 3)
    layers = [nn.Linear(*pair, dtype=torch.float64) for pair in pairwise(widths)]
    converted = convert_to_decorrelated(nn.Sequential(*layers)).double()
    for _, layer in decorrelated_layers(converted):
        layer.decorrelation.R.add_(0.1 * torch.randn_like(layer.decorrelation.R))
    configure_sampling(converted, RowSampling(fraction=fraction))
    return converted


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64)


def matrices(module: nn.Module) -> list[Tensor]:
    return [layer.decorrelation.R.detach().clone() for _, layer in decorrelated_layers(module)]


def stepped_by_hand(module: nn.Module, eta: float, kappa: float) -> list[Tensor]:
    """R - eta C R of every layer with C written out, from the gathered rows."""
    results = []
    for _, layer in decorrelated_layers(module):
        R = layer.decorrelation.R
        z = layer.decorrelation.rows @ R.T
        second = z.T @ z / len(z)
        variances = second.diag()
        C = (1 - kappa) * (second - torch.diag(variances)) + kappa * torch.diag(variances - 1)
        results.append(R - eta * C @ R)
    return results


@pytest.mark.parametrize("group_numbers", [1, 2**24])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("rows", "kappa"), [(3, 0.0), (3, 0.4), (40, 0.0), (40, 0.4)])
def test_update_is_the_formula_in_groups_of_any_size(
    monkeypatch: pytest.MonkeyPatch, rows: int, kappa: float, distributed: bool, group_numbers: int
) -> None:
    monkeypatch.setattr(hf_dbp.update, "GROUP_NUMBERS", group_numbers)
    monkeypatch.setattr(hf_dbp.update, "is_distributed", lambda: distributed)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))  # two processes, equal rows
    module = model()
    module(inputs(rows))
    module[1].decorrelation.rows = module[1].decorrelation.rows[: rows - 1]  # a shape of its own among equal widths
    expected = stepped_by_hand(module, 0.03, kappa)
    update_decorrelation(module, eta=0.03, kappa=kappa)
    torch.testing.assert_close(matrices(module), expected, rtol=1e-10, atol=1e-10)


def full(R: Tensor) -> Tensor:
    """A block-diagonal R as one matrix."""
    return torch.block_diag(*R)  # type: ignore[no-untyped-call]


def with_blocks() -> nn.Sequential:
    """Inputs of 12 features in three blocks, and of 4 in a full R, so that all matrices have one width; float64."""
    layers = (nn.Linear(12, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64))
    module = nn.Sequential(*(DecorrelatedLinear.from_linear(one, blocks=one.in_features // 4) for one in layers))
    for layer in module.double():
        layer.decorrelation.R.add_(0.1 * torch.randn_like(layer.decorrelation.R))
    configure_sampling(module, RowSampling(fraction=1.0))
    return module


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("rows", "kappa"), [(3, 0.0), (40, 0.4)])
def test_the_update_of_blocks_is_the_formula_within_each(
    monkeypatch: pytest.MonkeyPatch, rows: int, kappa: float, distributed: bool
) -> None:
    """C of the whole input, written out, with zeros between the blocks."""
    monkeypatch.setattr(hf_dbp.update, "is_distributed", lambda: distributed)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))  # two processes, equal rows
    module = with_blocks()
    module(torch.randn(rows, 12, dtype=torch.float64))
    expected = []
    for _, layer in decorrelated_layers(module):
        R, within = layer.decorrelation.R, full(torch.ones_like(layer.decorrelation.R.view(-1, 4, 4)))
        z = layer.decorrelation.rows @ (full(R) if R.ndim == 3 else R).T
        second = within * (z.T @ z) / rows
        d = second.diag()
        C = (1 - kappa) * (second - torch.diag(d)) + kappa * torch.diag(d - 1)
        expected.append((full(R) if R.ndim == 3 else R) - 0.03 * C @ (full(R) if R.ndim == 3 else R))
    measured = measure_decorrelation(module)["0"]
    blocks = [z.T @ z / rows for z in (module[0].decorrelation.rows @ full(module[0].decorrelation.R).T).chunk(3, -1)]
    within_each = torch.stack([torch.stack(decorrelation_metrics(S)) for S in blocks]).mean(dim=0)
    torch.testing.assert_close(torch.stack(measured), within_each, rtol=1e-10, atol=1e-12)
    update_decorrelation(module, eta=0.03, kappa=kappa)
    found = [full(R) if R.ndim == 3 else R for R in matrices(module)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_each_block_has_its_own_share_of_eta_and_the_layer_reports_the_smallest() -> None:
    module, x = with_blocks(), torch.randn(40, 12, dtype=torch.float64)
    x[:, 4:8] *= 100.0
    module[0](x)
    before = module[0].decorrelation.R.clone()
    shares = update_decorrelation(module[0], eta=0.03)
    moved = (module[0].decorrelation.R - before).flatten(1).norm(dim=-1)
    alone = []
    for block, columns in zip(before, x.chunk(3, -1), strict=True):
        one = DecorrelatedLinear.from_linear(nn.Linear(4, 1, dtype=torch.float64)).double()
        one.decorrelation.R.copy_(block)
        configure_sampling(one, RowSampling(fraction=1.0))
        one(columns)
        alone.append(update_decorrelation(one, eta=0.03)[""])
    assert [float(share) for share in alone] == [1.0, pytest.approx(float(alone[1])), 1.0]
    assert 0 < shares[""] < 0.05
    torch.testing.assert_close(shares[""], alone[1])
    assert (moved > 0).all()


@pytest.mark.slow
def test_repeated_updates_decorrelate_every_layer() -> None:
    module, x = model(), inputs(200) @ torch.randn(6, 6, dtype=torch.float64)
    module(x)
    before = measure_decorrelation(module)
    for _ in range(1500):
        update_decorrelation(module, eta=0.04)
        module(x)
    after = measure_decorrelation(module)
    assert before.keys() == after.keys() == {"0", "1", "2", "3", "4"}
    for name, (loss, correlation) in after.items():
        assert loss < 2e-3 * before[name][0], name
        assert correlation < 0.3 * before[name][1], name
    assert max(after["0"][1], after["1"][1]) < 1e-12  # the others have inputs of small variance: they take longer


def test_eight_micro_batches_of_one_are_one_of_eight() -> None:
    x, results = inputs(8), []
    for size in (1, 8):
        torch.manual_seed(1)
        module = model()
        for batch in x.split(size):
            module(batch)
        update_decorrelation(module, eta=0.05)
        results.append(matrices(module))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_measured_metrics_are_those_of_the_gathered_rows_and_keep_them() -> None:
    module = model()
    module(inputs(30))
    measured = measure_decorrelation(module)
    assert list(measured) == [name for name, _ in decorrelated_layers(module)]
    for name, layer in decorrelated_layers(module):
        z = layer.decorrelation.rows @ layer.decorrelation.R.T
        torch.testing.assert_close(measured[name], decorrelation_metrics(z.T @ z / 30), rtol=1e-10, atol=1e-12)


def test_an_update_uses_up_its_rows_and_the_next_draws_others() -> None:
    module, x, drawn = model(fraction=0.2), inputs(50), []
    for _ in range(2):
        module(x)
        drawn.append(module[0].decorrelation.rows)
        update_decorrelation(module, eta=0.0)
        assert all(layer.decorrelation.rows is None for _, layer in decorrelated_layers(module))
    assert not torch.equal(*drawn)


def test_a_draw_depends_on_seed_step_rank_and_layer_alone() -> None:
    x = inputs(200)

    def drawn(seed: int, step: int, rank: int) -> Tensor:
        module = model(fraction=0.1)
        seed_sampling(module, seed=seed, step=step, rank=rank)
        module(x)
        return module[0].decorrelation.rows  # type: ignore[return-value]

    assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
    assert not any(torch.equal(drawn(1, 2, 3), drawn(*other)) for other in ((0, 2, 3), (1, 3, 3), (1, 2, 0), (2, 1, 3)))
    module = model(fraction=0.1)
    seed_sampling(module, seed=1, step=2)
    keys = {layer.decorrelation.key.item() for _, layer in decorrelated_layers(module)}
    assert len(keys) == 5


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 3), st.integers(5, 40)), min_size=1, max_size=12),
    keys=st.lists(st.integers(0, 2**62), min_size=4, max_size=4),
)
def test_joint_draws_are_those_of_each_layer(counts: list[tuple[int, int]], keys: list[int]) -> None:
    """Whichever layers draw samples of whichever sizes in whichever order, often or never."""
    joint, drawn = JointDraws([torch.tensor(key) for key in keys]), [0] * len(keys)
    for layer, num_rows in counts:
        alone = sample_rows(num_rows, num_rows // 2, torch.tensor(keys[layer] + drawn[layer]))
        drawn[layer] += 1
        assert torch.equal(joint.rows(layer, num_rows, num_rows // 2), alone)


def test_a_loop_that_seeds_once_keeps_no_old_draws() -> None:
    joint = JointDraws([torch.tensor(key) for key in (3, 4, 5)])
    for _ in range(20):
        for layer in range(3):
            joint.rows(layer, 30, 10)
    assert len(joint.asked) == len(joint.known) == 1


def test_switching_gathering_off_and_discarding() -> None:
    module = model()
    set_gathering(module, False)
    module(inputs(4))
    with pytest.raises(ValueError, match="no rows were gathered: run a forward pass in train mode"):
        update_decorrelation(module)
    set_gathering(module, True)
    module(inputs(4))
    before = matrices(module)
    discard_rows(module)
    with pytest.raises(ValueError, match="no rows were gathered"):
        measure_decorrelation(module)
    assert all(map(torch.equal, before, matrices(module)))


def test_a_plain_module_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    for call in (update_decorrelation, measure_decorrelation, discard_rows, lambda m: seed_sampling(m, seed=0, step=0)):
        with pytest.raises(ValueError, match="Sequential has no decorrelated layer; see convert_to_decorrelated"):
            call(plain)


def test_float32_R_is_updated_in_float32_even_from_bf16_rows_inside_autocast() -> None:
    module = convert_to_decorrelated(nn.Sequential(nn.Linear(6, 6))).to(torch.bfloat16)
    configure_sampling(module, RowSampling(fraction=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(50, 6, dtype=torch.bfloat16))
        rows = module[0].decorrelation.rows.double()
        update_decorrelation(module, eta=0.01)
    second = rows.T @ rows / 50
    expected = torch.eye(6, dtype=torch.float64) - 0.01 * (second - torch.diag(second.diag()))
    torch.testing.assert_close(matrices(module)[0].double(), expected, rtol=1e-6, atol=1e-7)


def test_tf32_is_set_for_the_products_alone() -> None:
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    with tf32_products(torch.device("cuda")):
        assert flags.fp32_precision == "tf32"
    with tf32_products(torch.device("cpu")):
        assert flags.fp32_precision == before
    assert flags.fp32_precision == before
    assert flags.allow_tf32 is False  # the older switch still answers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_that_are_not_finite_do_not_reach_r(value: float) -> None:
    """The layer concerned keeps its R to the bit and says so; the others take their step."""
    module = convert_to_decorrelated(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))).train()
    configure_sampling(module, RowSampling(fraction=1.0))
    before = matrices(module)
    module(torch.randn(30, 6))
    module[1].decorrelation.rows[3, 2] = value
    shares = update_decorrelation(module, eta=0.01)
    assert {name: share.item() for name, share in shares.items()} == {"0": 1.0, "1": 0.0}
    after = matrices(module)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])
    assert after[0].isfinite().all()


@pytest.mark.parametrize("rows", [4, 40])  # fewer and more than features: two orders of products
def test_twenty_steps_of_the_papers_recipe_are_the_published_ones_to_the_bit(rows: int) -> None:
    """Kept apart from the package: what 0.1.0 computed, operation by operation, at the paper's settings."""
    eta, R = 5e-4, torch.eye(24).unsqueeze(0)
    module = convert_to_decorrelated(nn.Sequential(nn.Linear(24, 24))).train()
    configure_sampling(module, RowSampling(fraction=1.0))
    for bound in (False, True) * 10:
        x = torch.randn(rows, 1) + torch.randn(rows, 24)
        module(x)
        update_decorrelation(module, eta=eta, bound=bound)
        z, count = x.unsqueeze(0) @ R.mT, torch.tensor([float(rows)])
        zzR = z.mT @ (z @ R) if rows < 24 else (z.mT @ z) @ R
        d = z.square().sum(dim=-2) / count.unsqueeze(-1)
        R.mul_((1.0 + eta * d).unsqueeze(-1)).addcmul_(zzR, (eta / count)[..., None, None], value=-1)
        assert torch.equal(matrices(module)[0], R[0])
    assert not torch.equal(R[0], torch.eye(24))


@pytest.mark.parametrize("bound", [True, False])
def test_r_is_finite_even_where_eta_makes_it_diverge(bound: bool) -> None:
    module = convert_to_decorrelated(nn.Sequential(nn.Linear(6, 6))).train()
    configure_sampling(module, RowSampling(fraction=1.0))
    shares, losses = [], []
    for _ in range(60):
        module(torch.randn(40, 1) + 0.1 * torch.randn(40, 6))
        losses.append(measure_decorrelation(module)["0"][0].item())
        shares.append(update_decorrelation(module, eta=50.0, bound=bound)["0"].item())
        assert matrices(module)[0].isfinite().all()
    if bound:
        assert 0 < min(shares) < 0.01
        assert max(losses) == losses[0]
    else:
        assert set(shares) == {0.0, 1.0}
        assert max(losses) > 1e6 * losses[0]


def test_the_bound_changes_no_bit_where_eta_is_stable() -> None:
    results = []
    for bound in (True, False):
        torch.manual_seed(1)
        module = model()
        for _ in range(5):
            module(inputs(30))
            assert {share.item() for share in update_decorrelation(module, eta=0.01, bound=bound).values()} == {1.0}
        results.append(matrices(module))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("features", "variance"), [(768, 1.0), (1024, 1.0), (3072, 0.6)])
def test_the_papers_eta_is_stable_on_inputs_that_all_move_together(features: int, variance: float) -> None:
    """The largest eigenvalue that normalised inputs of ViT-B and ViT-L can have: the bound leaves every bit alone."""
    results = []
    for bound in (True, False):
        torch.manual_seed(1)
        with torch.device("meta"):
            linear = nn.Linear(features, 1)
        module = convert_to_decorrelated(nn.Sequential(linear.to_empty(device="cpu"))).train()
        module[0].decorrelation.rows = variance**0.5 * torch.randn(40, 1).sign().expand(40, features)
        assert update_decorrelation(module, eta=5e-4, bound=bound)["0"].item() == 1.0
        results.append(matrices(module)[0])
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.eye(features))


class HostReads(TorchDispatchMode):
    """Counts the operators that make a host wait for a device: reads of a value, and shapes that depend on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_step_reads_a_value_back() -> None:
    module, x = model(fraction=0.5), inputs(40)
    with HostReads() as reads:
        torch.ones(()).item()
        for step in range(2):
            seed_sampling(module, seed=0, step=step)
            module(x).sum().backward()
            measure_decorrelation(module)
            update_decorrelation(module, kappa=0.1)
    assert reads.found == ["aten._local_scalar_dense.default"]  # the one above, which shows that reads are seen


TWO_PROCESSES = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Uneven rows on two gloo processes under DDP: R is equal to the bit, and that of one process on all rows."""
    command = [sys.executable, str(TWO_PROCESSES), str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        outcomes = [(process.communicate(timeout=180)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [code for _, code in outcomes] == [0, 0], outcomes
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, first["together"], second["together"]))
    torch.testing.assert_close(first["together"], first["alone"], rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, first["sampled"], second["sampled"]))
    assert torch.equal(first["measured"], second["measured"])
    assert all(map(torch.equal, first["bounded"], second["bounded"]))
    assert all(R.isfinite().all() for R in first["bounded"])
    assert torch.equal(first["shares"], second["shares"])
    assert first["shares"][0] == 0  # the second process saw a value that is not finite
    assert (first["shares"][1:] > 0).all()
    assert (first["shares"][1:] < 1).any()
    assert not torch.equal(first["rows"], second["rows"])

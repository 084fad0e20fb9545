"""`Muon` takes the step of `torch.optim.Muon`, for any mixture of shapes; in float32, that of its formula."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_dbp import precision
from hf_dbp.training import muon
from hf_dbp.training.muon import Muon, newton_schulz

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = st.lists(st.sampled_from([(8, 8), (24, 8), (8, 24), (5, 7), (1, 6)]), min_size=1, max_size=6)


def matrices(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@patch.object(precision, "cpu_is_fast", lambda dtype: True)  # in bfloat16, as torch's
@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 1000), missing=st.integers(0, 5))
def test_the_step_is_that_of_torch(shapes, seed, missing):
    ours, torchs = matrices(shapes, seed), matrices(shapes, seed)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = [Muon(ours, **options), torch.optim.Muon(torchs, adjust_lr_fn="match_rms_adamw", **options)]
    for step in range(3):
        for params, optimizer in zip((ours, torchs), optimizers, strict=True):
            before = [p.detach().clone() for p in params]
            for i, (p, grad) in enumerate(zip(params, matrices(shapes, seed + 1 + step), strict=True)):
                p.grad = None if i == missing else grad.detach()
            optimizer.step()
            changes = [p.detach() - b for p, b in zip(params, before, strict=True)]
            if params is ours:
                expected = changes
        for ours_change, torch_change in zip(expected, changes, strict=True):
            # bfloat16 keeps 8 bits, and the iteration multiplies a difference: 2 % of the step's norm
            assert (ours_change - torch_change).norm() <= 0.02 * torch_change.norm()
    for p, q in zip(ours, torchs, strict=True):
        if p in optimizers[0].state:
            buffer = optimizers[0].state[p]["momentum_buffer"]
            torch.testing.assert_close(buffer, optimizers[1].state[q]["momentum_buffer"])


def iterated(M):
    """The iterations by their formula, on the singular values, in float64."""
    a, b, c = COEFFICIENTS
    U, values, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return U @ torch.diag_embed(values) @ Vh


@pytest.mark.parametrize(("fast", "kind", "error"), [(True, torch.bfloat16, 0.02), (False, torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64), (2, 16, 20)])
def test_the_iterations_change_the_singular_values_alone(monkeypatch, fast, kind, error, shape):
    monkeypatch.setattr(precision, "cpu_is_fast", lambda dtype: fast)
    by_gram = []
    monkeypatch.setattr(muon, "_factor", lambda *args, plain=muon._factor: by_gram.append(1) or plain(*args))
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(M, COEFFICIENTS, 5, 1e-7)
    assert found.dtype is kind
    assert bool(by_gram) == (kind is torch.float32 and 64 in shape)  # X X^T alone, for wide ones
    expected = iterated(M)
    assert (found - expected).norm() <= error * expected.norm()
    if kind is torch.float32:  # the iterations magnify rounding 3.4445^5 = 485 times
        flat = M[:, :, :1] * M[:, :1]
        expected = iterated(flat)
        found = newton_schulz(flat, COEFFICIENTS, 5, 1e-7)
        assert (found - expected).norm() <= 1e-3 * expected.norm()
        assert not newton_schulz(0 * M, COEFFICIENTS, 5, 1e-7).any()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64)])
def test_the_singular_values_become_one_and_the_vectors_stay(shape):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, values, Vh = torch.linalg.svd(M, full_matrices=False)
    O = newton_schulz(M, COEFFICIENTS, 5, 1e-7).float()  # noqa: E741
    along = torch.einsum("lok,lod,lkd->lk", U, O, Vh)
    strong = values > 0.05 * values.norm(dim=-1, keepdim=True)  # smaller ones need more iterations
    assert along[strong].min() > 0.6
    assert along[strong].max() < 1.25
    torch.testing.assert_close(U.mT @ O @ Vh.mT, torch.diag_embed(along), atol=0.05, rtol=0)


def test_a_state_of_torch_goes_on():
    ours, torchs = matrices([(8, 8)], 0), matrices([(8, 8)], 0)
    theirs = torch.optim.Muon(torchs, lr=0.02, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    torchs[0].grad = torch.ones(8, 8)
    theirs.step()
    optimizer = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.0)
    optimizer.load_state_dict(theirs.state_dict())
    assert torch.equal(optimizer.state[ours[0]]["momentum_buffer"], theirs.state[torchs[0]]["momentum_buffer"])


def test_a_closure_gives_the_loss():
    (weight,) = matrices([(4, 4)], 0)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    before = weight.square().sum().item()
    assert Muon([weight], lr=0.01, momentum=0.9, weight_decay=0.0).step(closure) == before

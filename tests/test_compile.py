"""torch.compile: one graph, the same numbers as eager, rows gathered once, at most one recompilation per case."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import checkpoint_activations
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

from hf_dbp.callbacks import DecorrelationArguments, DecorrelationCallback
from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.conversion import convert_to_decorrelated, decorrelated_layers
from hf_dbp.layers import DecorrelatedLinear, RowSampling
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.update import configure_sampling, set_gathering, update_decorrelation

Maker = Callable[..., DBPViTMAEConfig]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str, fullgraph: bool = True) -> tuple[nn.Module, CompileCounterWithBackend]:
    """The compiled model and a counter of the graphs made for it; the tracing is that of inductor in any case."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=fullgraph), counter  # type: ignore[return-value]


def step(call: Callable[..., Tensor], model: nn.Module, batches: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Losses, gradients and matrices after one step of R (without one if nothing is gathered)."""
    losses = []
    for batch in batches:
        losses.append(call(*batch))
        losses[-1].backward()
    if next(decorrelated_layers(model))[1].decorrelation.gathering:
        update_decorrelation(model, eta=0.05)
    result = {f"loss {i}": loss.detach() for i, loss in enumerate(losses)}
    result |= {name: (p if p.grad is None else p.grad).detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return result


def mae(config: DBPViTMAEConfig) -> tuple[DBPViTMAEForPreTraining, list[tuple[Tensor, ...]]]:
    model = DBPViTMAEForPreTraining(config).train()
    return model, [(torch.randn(4, 3, 32, 32), torch.rand(4, 16)) for _ in range(2)]


def loss_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda pixels, noise: model(pixels, noise=noise).loss


@pytest.mark.slow
def test_the_model_is_one_graph_for_training_one_without_gathering_and_one_for_evaluation(mae_config: Maker) -> None:
    model, batches = mae(mae_config(num_hidden_layers=1))
    twin = copy.deepcopy(model)
    fast, counter = compiled(model, "aot_eager")
    graphs = []
    for gathering in (True, True, False, True, False):
        for each in (model, twin):
            set_gathering(each, gathering)
        torch.testing.assert_close(step(loss_of(fast), model, batches[:1]), step(loss_of(twin), twin, batches[:1]))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 2]
    with torch.no_grad():
        assert torch.equal(loss_of(fast.eval())(*batches[0]), loss_of(twin.eval())(*batches[0]))
    assert counter.frame_count == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own, at a graph break
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.slow
def test_gradient_checkpointing_in_a_compiled_model_counts_rows_once(mae_config: Maker, flag: bool) -> None:
    """In one graph with the flag; without it each checkpointed block is a graph break, with the same numbers."""
    model, batches = mae(mae_config(num_hidden_layers=1))
    configure_sampling(model, RowSampling(fraction=1.0))
    twin = copy.deepcopy(model)
    checkpoint_activations(model, use_reentrant=False)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=flag):
        fast, _ = compiled(model, "aot_eager", fullgraph=flag)
        loss_of(fast)(*batches[0]).backward()
    loss_of(twin)(*batches[0]).backward()
    for (name, ours), (_, theirs) in zip(decorrelated_layers(model), decorrelated_layers(twin), strict=True):
        torch.testing.assert_close(ours.decorrelation.rows, theirs.decorrelation.rows, msg=name)
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, msg=name)


@pytest.mark.slow
def test_a_run_compiles_checkpointed_blocks_without_graph_breaks(
    tmp_path: Path, mae_config: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback sets dynamo's switch for any Trainer that compiles, and back at the end."""
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", False)
    model = DBPViTMAEForPreTraining(mae_config(num_hidden_layers=1))
    views = [{"pixel_values": torch.randn(3, 32, 32), "noise": torch.rand(16)} for _ in range(4)]
    given = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    given |= {"torch_compile": True, "torch_compile_backend": "aot_eager", "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(tmp_path, remove_unused_columns=False, dataloader_pin_memory=False, **given)
    checkpoint_activations(model, use_reentrant=False)
    torch._dynamo.utils.counters.clear()
    callback = DecorrelationCallback(DecorrelationArguments(update_interval=1))
    Trainer(model, args, train_dataset=views, callbacks=[callback]).train()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint, "set back"
    assert any(not layer.decorrelation.R.equal(torch.eye(len(layer.decorrelation.R)))
               for _, layer in decorrelated_layers(model))  # fmt: skip


class Small(nn.Module):
    """A patch projection and two linears, all decorrelated, one of them in blocks; the loss of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.hidden = nn.Conv2d(2, 6, 4, 4), nn.Linear(6, 8)
        self.out = DecorrelatedLinear.from_linear(nn.Linear(8, 4), blocks=2)
        convert_to_decorrelated(self, lambda *_: True)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.hidden(self.patches(pixels).flatten(2).mT).tanh()).square().mean()


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.slow
def test_accumulation_compiles_three_graphs_and_draws_the_eager_rows() -> None:
    """No rows yet, rows of one micro-batch, rows of several (of any number): then never again."""
    model = Small()
    configure_sampling(model, RowSampling(fraction=0.4))
    twin, graphs = copy.deepcopy(model), []
    fast, counter = compiled(model, "inductor")
    for micro_batches in (1, 1, 4, 4, 6, 1):
        batches = [(torch.randn(5, 2, 16, 16),) for _ in range(micro_batches)]
        torch.testing.assert_close(step(fast, model, batches), step(twin, twin, batches))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 3, 3, 3, 3]
    fast(*batches[0]), twin(*batches[0])
    assert torch.equal(model.patches.decorrelation.rows, twin.patches.decorrelation.rows)

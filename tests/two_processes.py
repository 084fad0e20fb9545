"""One of two gloo processes of `test_update.test_two_processes_are_one`: python two_processes.py FOLDER RANK."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_dbp.conversion import convert_to_decorrelated, decorrelated_layers
from hf_dbp.layers import DecorrelatedLinear, RowSampling
from hf_dbp.update import configure_sampling, measure_decorrelation, seed_sampling, update_decorrelation

BATCHES = [torch.randn(5 + 3 * i, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def model(fraction: float) -> nn.Module:
    torch.manual_seed(0)
    blocks = DecorrelatedLinear.from_linear(nn.Linear(8, 4), blocks=2)
    converted = convert_to_decorrelated(nn.Sequential(nn.Linear(8, 8), nn.GELU(), blocks, nn.Linear(4, 2)))
    configure_sampling(converted, RowSampling(fraction=fraction))
    return converted


def train(module: nn.Module, batches: list[Tensor], steps: int = 3, eta: float = 0.1) -> list[Tensor]:
    """A few steps of the optimizer and of R; returns the final matrices. The weights get no gradients here."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.1)
    for step in range(steps):
        seed_sampling(module, seed=0, step=step, rank=dist.get_rank() if dist.is_initialized() else 0)
        for batch in batches:
            module(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_decorrelation(module, eta=eta)
    return [layer.decorrelation.R for _, layer in decorrelated_layers(module)]


def distributed_results(rank: int) -> dict[str, object]:
    """What this process found. Its DDP models end with it: one that outlives the process group can hang at exit."""
    together = train(DistributedDataParallel(model(1.0)), BATCHES[rank::2])
    module = DistributedDataParallel(model(0.5))
    sampled = train(module, BATCHES[rank::2])
    module(BATCHES[rank])
    measured = torch.stack([torch.stack(pair) for pair in measure_decorrelation(module).values()])
    rows = module.module[0].decorrelation.rows[:2]
    unstable = DistributedDataParallel(model(1.0))
    train(unstable, BATCHES[rank::2], eta=20.0)
    unstable(BATCHES[rank])
    if rank == 1:
        unstable.module[0].decorrelation.rows[0, 0] = float("nan")
    shares = torch.stack(list(update_decorrelation(unstable, eta=20.0).values()))
    bounded = [layer.decorrelation.R for _, layer in decorrelated_layers(unstable)]
    found = {"together": together, "sampled": sampled, "rows": rows, "measured": measured}
    return found | {"bounded": bounded, "shares": shares}


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    alone = train(model(1.0), BATCHES)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(distributed_results(rank) | {"alone": alone}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

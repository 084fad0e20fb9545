"""One of two gloo processes of `test_any_model_trainers`: python two_any_model_processes.py FOLDER RANK."""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

import zoo

from hf_dbp.any_model import decorrelate, survey_layers
from hf_dbp.layers import RowSampling
from hf_dbp.update import configure_sampling, decorrelations, seed_sampling, update_decorrelation


class Experts(nn.Module):
    """Each process sends its tokens to one expert, nobody to the third."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](x).sum()


def matrices(model, steps, *batches, fraction=1.0):
    """R after a few steps; weights stay as they are."""
    configure_sampling(model, RowSampling(fraction=fraction))
    model.eval()  # no dropout
    for _, decorrelation in decorrelations(model):
        decorrelation.train()
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(steps):
        seed_sampling(model, seed=0, step=step, rank=rank)
        for batch in batches:
            model(**batch)
        shares = update_decorrelation(model, eta=0.05)
        assert len(shares) == len(decorrelations(model))
    return {name.removeprefix("module."): decorrelation.R.clone() for name, decorrelation in decorrelations(model)}


def bert():
    torch.manual_seed(0)
    model, batch = zoo.bert()
    batches = [batch, {key: value.flip(0)[:2] for key, value in batch.items()}]
    return model, batches


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    model, batches = bert()
    name = "bert.encoder.layer.0.intermediate.dense"
    found = {"R:one": matrices(decorrelate(model, "all", batch=batches[0]), 3, *batches)[name]}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

    model, batches = bert()
    decorrelate(model, "all", batch=batches[rank])
    together = matrices(DistributedDataParallel(model), 3, batches[rank])
    found |= {f"R:{key}": R for key, R in together.items()} | {"R:bert": together[name]}
    sampled = matrices(model, 2, batches[rank], fraction=0.5)
    found |= {f"R:sampled {key}": R for key, R in sampled.items()}

    torch.manual_seed(0)
    experts = Experts()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))
    survey = {one.names[0]: one for one in survey_layers(experts, (x, rank))}
    found["tokens"] = {key: one.tokens for key, one in survey.items()}
    assert survey["experts.2"].plain and not survey["experts.0"].plain and not survey["experts.1"].plain

    # the third is called by nobody in the first batch; from a batch that calls it, it has an R that nothing changes
    class All(Experts):
        def forward(self, x, expert):
            return sum(e(1.0 * x).sum() for e in self.experts) if expert is None else super().forward(x, expert)

    everyone = All()
    decorrelate(everyone, "all", batch=(x, None))
    found |= {f"R:{key}": R for key, R in matrices(everyone, 2, {"x": x, "expert": rank}).items()}

    torch.manual_seed(0)
    wide = nn.ModuleDict({"a": nn.Linear(8, 64), "b": nn.Linear(8, 1)})  # b: no gain, and dear
    wide.forward = lambda x, y: wide["a"](x) + wide["b"](y)  # type: ignore[method-assign]
    mix = torch.randn(8, 8)
    generator = torch.Generator().manual_seed(10 + rank)
    x, y = (torch.randn(2000 + 500 * rank, 8, generator=generator) for _ in range(2))
    survey = survey_layers(wide, (x @ mix, y))
    found["survey"] = [(one.names, one.tokens, one.rows, one.correlation) for one in survey]
    found["auto"], found["layers"] = [one.names[0] for one in survey if one.pays()], 2
    torch.save(found, folder / f"{rank}.pt")
    gc.collect()  # a DDP model that outlives the process group can hang at exit
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

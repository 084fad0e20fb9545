"""Pre-training in a process that must leave no process group and no DDP model behind, however the run ended."""

import gc
import sys

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_dbp.pretraining import main
from hf_dbp.training import processes

stock, outlived = processes.PartialState.destroy_process_group, []


def destroy_process_group(state: processes.PartialState) -> None:
    outlived.extend(held for held in gc.get_objects() if isinstance(held, DistributedDataParallel))
    stock(state)


if __name__ == "__main__":
    processes.PartialState.destroy_process_group = destroy_process_group
    try:
        main(sys.argv[1:])
    finally:
        assert not dist.is_initialized(), "a process group is left"
        assert not outlived, "a DDP model outlived its process group"

"""One of two processes of `test_guards.test_processes_decide_alike`: python guarded_process.py FOLDER."""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_dbp.training.guards import GuardCallback
from hf_dbp.training.processes import end_processes

RANK = int(os.environ["RANK"])


class Line(nn.Module):
    """Its loss is infinite in the second process at the third step; the gradient is that of the other steps."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(3))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (self.slope * x - 1).square().mean()
        if self.training:
            self.calls += 1
            loss = loss + (float("inf") if RANK == 1 and self.calls == 3 else 0.0)
        return {"loss": loss}


class Recorded(TrainerCallback):
    """Keeps the weights before every step."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        weights.append(model.slope.detach().clone())


weights: list[torch.Tensor] = []

if __name__ == "__main__":
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 0.1, "max_grad_norm": 1.0}
    options |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(sys.argv[1], dataloader_pin_memory=False, **options)
    data = [{"x": torch.rand(3)} for _ in range(32)]
    trainer = Trainer(model=Line(), args=args, train_dataset=data, callbacks=[Recorded(), guard := GuardCallback()])
    trainer.train()
    weights.append(trainer.model.slope.detach().clone())
    found = {"weights": torch.stack(weights), "skipped": guard.skipped_steps(trainer.state)["skipped"]}
    torch.save(found, Path(sys.argv[1]) / f"{RANK}.pt")
    del trainer
    end_processes()

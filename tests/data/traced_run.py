"""A pre-training run that records what each step saw; run as a separate process, with TRACE naming a folder.

Each rank appends a line a step to `TRACE/rank-R.jsonl`: the images as (epoch, index), the loss, a digest of every R.
With KILL_AT=N the process kills itself (SIGKILL) when step N begins; with SLEEP=0 the Hub client does not pause between
attempts.
"""

import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

if os.environ.get("SLEEP") == "0":
    time.sleep = lambda seconds: None

from hf_dbp.conversion import decorrelated_layers
from hf_dbp.data.augmentation import image_rng
from hf_dbp.pretraining import main
from hf_dbp.training.trainer import MAETrainer


@functools.cache
def images_by_noise(seed: int, epoch: int, count: int) -> dict[float, int]:
    """The first number of an image's mask noise tells which image it is."""
    return {float(image_rng(seed, epoch, index).random(1, dtype="float32")[0]): index for index in range(count)}


def traced(training_step):
    def step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == int(os.environ.get("KILL_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        epoch = self.sampler.epoch
        known = images_by_noise(self.args.seed, epoch, len(self.train_dataset))
        loss = training_step(self, model, inputs, *args, **kwargs)
        digest = hashlib.sha1()
        for _, layer in decorrelated_layers(self.accelerator.unwrap_model(model)):
            digest.update(layer.decorrelation.R.detach().numpy().tobytes())
        line = {
            "step": self.state.global_step,
            "images": [(epoch, known[value]) for value in inputs["noise"][:, 0].tolist()],
            "loss": float(loss),
            "R": digest.hexdigest(),
        }
        with (Path(os.environ["TRACE"]) / f"rank-{self.args.process_index}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return loss

    return step


if __name__ == "__main__":
    MAETrainer.training_step = traced(MAETrainer.training_step)
    main(sys.argv[1:])

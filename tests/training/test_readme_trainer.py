"""README's Trainer in a separate script, on labelled images as in data sets on the Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

#: what surrounds the lines copied from README: labelled images, and everything that a user then does
SCRIPT = """
import json
import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import TrainingArguments
import hf_dbp
from hf_dbp import DecorrelationCallback
{model}

noise = np.random.default_rng(0)
pictures = [Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(16)]


def views(rows):
    pixels = [torch.tensor(np.array(one)).permute(2, 0, 1) / 255 for one in rows["image"]]
    return {{"pixel_values": pixels, "label": rows["label"]}}


images = Dataset.from_dict({{"image": pictures, "label": [number % 3 for number in range(16)]}}).with_transform(views)


def new_model(trial=None):
    torch.manual_seed(0)
    return {construction}


def trainer(folder, model=None, model_init=None, **options):
    args = TrainingArguments(
        folder, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, remove_unused_columns=False, report_to="tensorboard",
        use_cpu=True, disable_tqdm=True, **options,
    )
    given = dict(model=model, model_init=model_init, args=args, train_dataset=images, eval_dataset=images)
    return {trainer}


def losses(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]


whole = trainer("whole", new_model(), max_steps=2, lr_scheduler_type="constant")
whole.train()
parts = {{
    count: trainer(f"parts{{count}}", new_model(), max_steps=1, gradient_accumulation_steps=count) for count in (1, 4)
}}
for run in parts.values():
    run.train()
resumed = trainer("whole", new_model(), max_steps=6, lr_scheduler_type="constant")
resumed.train(resume_from_checkpoint=True)
undisturbed = trainer("undisturbed", new_model(), max_steps=6, lr_scheduler_type="constant")
undisturbed.train()
search = trainer("search", model_init=new_model, max_steps=2)
best = search.hyperparameter_search(
    lambda trial: {{"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}}, n_trials=2, backend="optuna"
)
found = {{
    "evaluated": whole.evaluate()["eval_loss"], "best": best.run_id,
    "first": {{count: losses(run)[0] for count, run in parts.items()}},
    "undisturbed": losses(undisturbed), "resumed": losses(resumed),
}}
print("FOUND " + json.dumps(found))
"""


def script():
    """README's example up to the optimizer, and the Trainer that it names in place of the loop."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from transformers import ViTModel\n.*?)```", text, flags=re.DOTALL)
    model = code.partition("optimizer = ")[0]
    (call,) = re.findall(r"`(hf_dbp\.ResumingTrainer\(\.\.\., callbacks=\[.*?\]\))`", text)
    construction = re.search(r"^model = (.*)$", model, flags=re.MULTILINE)[1]
    return SCRIPT.format(model=model, construction=construction, trainer=call.replace("...", "**given"))


def logged(folder):
    """Name -> number of values in the TensorBoard files below a folder."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    found = {}
    for file in folder.rglob("events.out.tfevents*"):
        reader = events.EventAccumulator(str(file)).Reload()
        for name in reader.Tags()["scalars"]:
            found[name] = found.get(name, 0) + len(reader.Scalars(name))
    return found


def test_readmes_trainer_does_what_a_trainer_does(tmp_path):
    """Accumulates, evaluates, resumes, searches, and logs the loss and the correlations of R."""
    for name in ("optuna", "tensorboard"):
        pytest.importorskip(name, reason=f"no {name}: README's Trainer is not tried with it")
    (tmp_path / "train.py").write_text(script(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])
    assert found["evaluated"] > 0
    assert found["resumed"] == found["undisturbed"] and len(found["resumed"]) == 6
    assert found["first"]["4"] == pytest.approx(found["first"]["1"], rel=0.1)  # not four times
    assert found["best"] in ("0", "1")
    for run, steps in (("whole", 6), ("search/run-0", 2), ("search/run-1", 2)):
        assert (tmp_path / run / f"checkpoint-{steps}").is_dir()
    for run, steps in (("whole", 6), ("search", 4)):  # two trials of two steps
        counts = logged(tmp_path / run)
        for name in ("train/loss", "train/decorrelation_loss", "train/mean_squared_correlation"):
            assert counts[name] == steps, (run, counts)
        assert counts["eval/loss"] >= 2

"""Decorrelation in training loops that know nothing of it: a stock Trainer, accelerate, a plain loop; two processes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_dbp.any_model import decorrelate
from hf_dbp.callbacks import DecorrelationArguments, DecorrelationCallback
from hf_dbp.conversion import decorrelated_layers, fuse
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.update import update_decorrelation


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(2, 50, (8,), generator=torch.Generator().manual_seed(index))
        mask = (torch.arange(8) < 3 + index % 6).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        pixels = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 2}


def batch(data, count=4):
    return torch.utils.data.default_collate([data[i] for i in range(count)])


def vit():
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **zoo.BODY)), None


def trainer_of(make, folder, trainer_class=Trainer, **options):
    """The two lines in a user's script."""
    torch.manual_seed(0)
    model, data = make()[0], Pictures() if make is vit else Sentences()
    given = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    given |= {"use_cpu": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    given |= {"learning_rate": 5e-2, "dataloader_pin_memory": False}
    args = TrainingArguments(folder, **(given | options))
    decorrelate(model, "all", batch=batch(data))
    callback = DecorrelationCallback(DecorrelationArguments(eta=0.05, sample_fraction=1.0, update_interval=1))
    return trainer_class(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback])


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore")  # of peft, on weights that are tied
@pytest.mark.parametrize(
    ("make", "trainer_class"),
    [(zoo.bert, Trainer), (zoo.lora, Trainer), (zoo.bert, ResumingTrainer), (vit, ResumingTrainer)],
)
def test_a_trainer_resumes_to_the_bit_and_ends_with_the_best_model(make, trainer_class, tmp_path):
    whole = trainer_of(make, tmp_path, trainer_class)
    whole.train()
    matrices = [layer.decorrelation.R for _, layer in decorrelated_layers(whole.model)]
    assert not any(torch.equal(R, torch.eye(len(R))) for R in matrices)
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed = trainer_of(make, tmp_path, trainer_class)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 8 and equal(whole.model, resumed.model)

    best = trainer_of(make, tmp_path / "best", trainer_class, load_best_model_at_end=True, learning_rate=20.0)
    best.train()
    assert make is vit or not best.state.best_model_checkpoint.endswith("-8")
    if make is not zoo.lora:
        stock = type(best.model).from_pretrained(best.state.best_model_checkpoint).eval()
        inputs = batch(Pictures() if make is vit else Sentences())
        torch.testing.assert_close(
            zoo.output(stock, inputs), zoo.output(best.model.eval(), inputs), rtol=1e-4, atol=1e-4
        )
        fused = fuse(best.model)
        fused.save_pretrained(tmp_path / "fused")
        loaded = type(fused).from_pretrained(tmp_path / "fused").eval()  # type: ignore[attr-defined]
        assert torch.equal(zoo.output(loaded, inputs), zoo.output(fused.eval(), inputs))


@pytest.mark.parametrize("how", ["best", "resume"])
def test_a_stock_trainer_is_refused_where_it_would_lose_tensors(how, tmp_path):
    """It saves a ViT under the names of transformers 4 but restores it by today's, and only warns."""
    trainer = trainer_of(vit, tmp_path, load_best_model_at_end=how == "best")
    if how == "best":
        with pytest.raises(ValueError, match=r"under names .* hf_dbp\.ResumingTrainer"):
            trainer.train()
        assert trainer.state.global_step == 0
        return
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    with pytest.raises(ValueError, match=r"under names .* hf_dbp\.ResumingTrainer"):
        trainer_of(vit, tmp_path).train(resume_from_checkpoint=True)


class Routed(torch.nn.Module):
    """Two experts, of which a batch may call only one."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(2))

    def forward(self, x, expert, labels):
        parts = [e(x[expert == i])[:, 0] - labels[expert == i] for i, e in enumerate(self.experts) if i in expert]
        return {"loss": torch.cat(parts).square().mean()}


def test_a_trainer_counts_the_steps_of_experts_that_come_and_go(tmp_path):
    rows = [{"x": torch.randn(4) * 100, "expert": int(i >= 8), "labels": 0.0} for i in range(12)]
    model = Routed()
    decorrelate(model, "all", batch=torch.utils.data.default_collate(rows))
    options = {"max_steps": 3, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, train_sampling_strategy="sequential", logging_steps=1, **options
    )
    callback = DecorrelationCallback(DecorrelationArguments(eta=0.5, sample_fraction=1.0, update_interval=1))
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    reduced = callback.shares.results()["reduced_eta"]
    assert {name: found["steps"] for name, found in reduced.items()} == {"experts.0": 2, "experts.1": 1}


def loop(steps, folder=None, accelerated=False):
    """A user's loop; saved to, and gone on from, ``folder`` in the middle."""
    torch.manual_seed(0)
    model, data = zoo.bert()[0], Sentences()
    decorrelate(model, "all", batch=batch(data))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = Accelerator(cpu=True) if accelerated else None
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    for step in range(steps):
        if folder is not None and step == 2:
            if accelerator is not None:
                accelerator.load_state(folder)
            else:
                saved = torch.load(folder / "state.pt", weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
        torch.manual_seed(step)
        loss = model(**batch(data)).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        update_decorrelation(model, eta=0.05)
    return model, optimizer, accelerator


@pytest.mark.parametrize("launcher", ["plain", "accelerate"])
def test_loops_of_ones_own_save_and_go_on_to_the_bit(launcher, tmp_path):
    accelerated = launcher == "accelerate"
    model, optimizer, accelerator = loop(2, accelerated=accelerated)
    if accelerator is None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    else:
        accelerator.save_state(tmp_path)
    whole, resumed = (loop(4, folder, accelerated)[0] for folder in (None, tmp_path))
    assert equal(whole, resumed)
    assert type(fuse(resumed)) is type(zoo.bert()[0])


@pytest.mark.slow
def test_two_processes_choose_alike_and_hold_one_r(tmp_path):
    """Each sees other sentences, of other lengths, and one expert only: R is equal to the bit, as one process's is."""
    script = Path(__file__).parent / "two_any_model_processes.py"
    running = [subprocess.Popen([sys.executable, script, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    for name, found in first.items():
        if name.startswith("R:"):
            assert torch.equal(found, second[name]), name
            assert name == "R:experts.2" or not torch.equal(found, torch.eye(len(found))), name
        else:
            assert found == second[name], name
    assert first["auto"] and len(first["auto"]) < first["layers"]
    assert torch.equal(first["R:experts.2"], torch.eye(4))
    torch.testing.assert_close(first["R:one"], first["R:bert"])

"""Someone who trains a BERT with decorrelation in a stock Trainer and pushes it: main([FOLDER]). Run by
test_any_model_push."""

import torch
from test_any_model_trainers import Sentences, batch
from transformers import BertForMaskedLM, Trainer, TrainingArguments
from zoo import bert, output

from hf_dbp import DecorrelationArguments, DecorrelationCallback, decorrelate, fuse


def main(arguments: list[str]) -> None:
    (folder,) = arguments
    torch.manual_seed(0)
    model, data = bert()[0], Sentences()
    decorrelate(model, "all", batch=batch(data))
    options = {"push_to_hub": True, "hub_model_id": "me/unfused", "report_to": "none", "use_cpu": True, "max_steps": 3}
    args = TrainingArguments(f"{folder}/run", learning_rate=5e-2, per_device_train_batch_size=4, **options)  # type: ignore[arg-type]
    callback = DecorrelationCallback(DecorrelationArguments(eta=0.05, sample_fraction=1.0, update_interval=1))
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
    trainer.train()
    trainer.push_to_hub()
    fuse(model).push_to_hub("me/fused")  # type: ignore[operator]
    model.eval()
    found = [BertForMaskedLM.from_pretrained(name).eval() for name in ("me/unfused", "me/fused")]
    torch.save([output(one, batch(data)).detach() for one in (model, *found)], f"{folder}/outputs.pt")

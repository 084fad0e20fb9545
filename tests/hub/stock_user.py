"""Someone without hf_dbp who pulls a fused model: python stock_user.py HUB_ID OUTPUT_FILE. Run by test_publishing."""

import re
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments, ViTForImageClassification, ViTModel, set_seed

assert "hf_dbp" not in sys.modules
sys.modules["hf_dbp"] = None  # type: ignore[assignment]  # every import of it fails from here on


class Brightness(torch.utils.data.Dataset):
    """32 two-channel images of 32 x 32 pixels, bright (class 1) or dark (class 0)."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": noise + (1 if index % 2 else -1), "labels": torch.tensor(index % 2)}


def loaded_as_the_card_says(name: str) -> ViTModel:
    code = re.search(r"```python\n(.*?)```", ModelCard.load(name).text, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["model"], ViTModel)
    assert_channels_stay_apart(names["processor"])
    return names["model"]


def assert_channels_stay_apart(processor: Any) -> None:
    """What the first channel becomes does not depend on the second (Pillow would take it for alpha)."""
    images = np.random.default_rng(0).integers(0, 255, (2, 48, 48, 2), dtype=np.uint8)
    images[1, ..., 0] = images[0, ..., 0]
    pixels = processor(list(images), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0, 0], pixels[1, 0])


def fine_tuned(name: str, folder: str) -> list[float]:
    """Losses of a few steps of the stock Trainer on the pulled encoder with a fresh head."""
    set_seed(0)
    model = ViTForImageClassification.from_pretrained(name, num_labels=2)
    arguments = TrainingArguments(folder, max_steps=24, per_device_train_batch_size=16, learning_rate=1e-3,
                                  logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Brightness())
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    name, output = sys.argv[1:]
    model = loaded_as_the_card_says(name).eval()
    with torch.no_grad():
        features = model(torch.linspace(-2, 2, 2 * 2 * 32 * 32).view(2, 2, 32, 32)).last_hidden_state
    with tempfile.TemporaryDirectory() as folder:
        losses = fine_tuned(name, folder)
    card = ModelCard.load(name).data.to_dict()
    torch.save({"features": features, "losses": losses, "card": card, "class": type(model).__name__}, output)


if __name__ == "__main__":
    main()

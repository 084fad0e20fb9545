"""Someone with hf_dbp who pulls an unfused model: main([HUB_ID, OUTPUT_FILE]). Run by test_publishing."""

import torch

from hf_dbp import load_fused_vit


def main(arguments: list[str]) -> None:
    name, output = arguments
    torch.save(load_fused_vit(name).state_dict(), output)

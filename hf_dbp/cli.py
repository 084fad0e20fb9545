"""`hf-dbp`: the installed command, which runs the same mains as `training_scripts/`.

hf-dbp inspect FOLDER        what it contains, how it will be used, and a recipe to start from
hf-dbp pretrain IMAGES ...   masked autoencoding            = training_scripts/run_dbp_mae.py --config whole_model.yaml
hf-dbp pretrain IMAGES --budget 2h  within that time, with all choices made for you
hf-dbp fuse RUN ...          run -> stock ViT               = training_scripts/fuse_checkpoint.py
hf-dbp finetune ...          UperNet or EoMT on labelled images  = training_scripts/run_upernet.py
hf-dbp classify ...          a classifier of your images    = training_scripts/run_classification.py
hf-dbp detect ...            boxes around objects, or masks  = training_scripts/run_detection.py
hf-dbp retrieve ...          segmentation without training, by the labels of the most similar patches
hf-dbp predict MODEL IMAGES  masks, classes or objects of new images, and a table
hf-dbp probe ...             is the encoder good?           = training_scripts/run_probe.py
hf-dbp embed VIT IMAGES ...  features of images as a table: near-duplicates, outliers, nearest images
hf-dbp select TABLE --budget 40  which images to label first
hf-dbp export MODEL IMAGES ...   as ONNX, checked against PyTorch on these images
hf-dbp compare ...           methods side by side           = training_scripts/run_comparison.py
hf-dbp demo [FOLDER]         pretrain, fuse and finetune on the built-in images

If you make a mistake, one line says what to do; HF_DBP_DEBUG=1 also shows its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_dbp.errors import UserError, command
from hf_dbp.training.duration import noted_beginning, process_began

__all__ = ["COMMANDS", "demo", "main"]

#: command -> module whose ``main(arguments)`` it runs
COMMANDS = {
    "inspect": "hf_dbp.inspection.folder",
    "pretrain": "hf_dbp.pretraining",
    "fuse": "hf_dbp.fusing",
    "finetune": "hf_dbp.downstream.segmentation.finetuning",
    "classify": "hf_dbp.downstream.classification.finetuning",
    "detect": "hf_dbp.downstream.detection.finetuning",
    "retrieve": "hf_dbp.downstream.segmentation.retrieval",
    "predict": "hf_dbp.downstream.predicting",
    "probe": "hf_dbp.downstream.probe",
    "compare": "hf_dbp.comparison.runner",
    "embed": "hf_dbp.downstream.embedding",
    "export": "hf_dbp.downstream.export",
    "select": "hf_dbp.downstream.selection",
}


def run_command(name: str, arguments: Sequence[str], began: float | None = None) -> None:
    """Run a command, which began then or begins now, under its own name, which argparse and the reports print."""
    program, sys.argv[0] = sys.argv[0], f"hf-dbp {name}"
    try:
        with noted_beginning(began):
            importlib.import_module(COMMANDS[name]).main(list(arguments))
    finally:
        sys.argv[0] = program


def demo(arguments: Sequence[str]) -> None:
    """Pre-train, fuse and fine-tune on the built-in images, in ``outputs`` or the given folder.

    Raises:
        UserError: flags or more than one folder were given.
    """
    if len(arguments) > 1 or any(one.startswith("-") for one in arguments):
        raise UserError(f"demo takes only a folder, hf-dbp demo [FOLDER]; got {' '.join(arguments)}")
    folder = Path(arguments[0] if arguments else "outputs")
    encoder, fused, segmenter = (str(folder / name) for name in ("demo", "demo-fused", "demo-upernet"))
    run_command("pretrain", ["--config", "demo.yaml", "--output_dir", encoder])
    run_command("fuse", [encoder, "--output_dir", fused])
    run_command("finetune", ["--config", "demo_upernet.yaml", "--model_name_or_path", fused, "--output_dir", segmenter])


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. An unknown one prints the list of commands and ends with exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (given[0], given[1:]) if given else ("", [])
    if name in COMMANDS:
        run_command(name, rest, process_began() if arguments is None else None)
    elif name == "demo" and not {"-h", "--help"} & set(rest):
        demo(rest)
    else:
        print(__doc__)
        if name not in ("", "-h", "--help", "demo"):
            similar = difflib.get_close_matches(name, [*COMMANDS, "demo"], n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise UserError(f"unknown command {name!r}{hint}")

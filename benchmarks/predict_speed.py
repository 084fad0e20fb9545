"""How fast `predict` is beside a plain loop over the same images, one at a time, in turns.

    python benchmarks/predict_speed.py MODEL IMAGES [--repeats 5] [--output predict_speed.json]

The loop does what a user would write with the same model: open an image, normalise it, send all its windows through the
model as one batch, in as many threads as PyTorch takes, average, take the argmax and save the mask as PNG. `predict`
does that and writes overlays, table and journal too. The masks of both must agree. Figures are medians over the
repeats, the ratio is the median of their ratios; wall-clock time, and processor time per image.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_dbp import predict
from hf_dbp.data.decoding import decode
from hf_dbp.downstream.predicting import load_predictor, samples_of
from hf_dbp.downstream.segmentation.sliding import WholeView, window_origins
from hf_dbp.records import hardware, versions, write_json


@torch.no_grad()
def plain(predictor: Any, images: str, output_dir: Path) -> None:
    """The loop: one image at a time."""
    crop = predictor.how.crop_size
    for name, files in samples_of(images, None)[0].items():
        image_HWC = decode({"bytes": None, "path": files[0]}, predictor.channels, files[0])
        view = WholeView(predictor.preparation.pixels(image_HWC), image_HWC.shape[:2])
        height, width = view.size
        places = [(t, left) for t in window_origins(height, crop) for left in window_origins(width, crop)]
        logits_BKSS = predictor.model(pixel_values=torch.stack([view.crop(*place, crop) for place in places])).logits
        if logits_BKSS.shape[2:] != (crop, crop):
            logits_BKSS = torch.nn.functional.interpolate(logits_BKSS, (crop, crop), mode="bilinear")
        sums = torch.zeros(logits_BKSS.shape[1], max(height, crop), max(width, crop))
        counts = torch.zeros(sums.shape[1:])
        for (top, left), logits_KSS in zip(places, logits_BKSS, strict=True):
            sums[:, top : top + crop, left : left + crop] += logits_KSS
            counts[top : top + crop, left : left + crop] += 1
        average = (sums / counts)[None, :, :height, :width]
        average = torch.nn.functional.interpolate(average, view.target, mode="bilinear")
        mask = output_dir / f"{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(average[0].argmax(0).to(torch.uint8).numpy()).save(mask)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of processors."""
    begin, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="threads that PyTorch may use")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    predictor: Any = load_predictor(args.model, device="cpu")
    rows: list[dict[str, tuple[float, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats + 1):  # the first warms up
            ours, loop = Path(folder, f"predict-{repeat}"), Path(folder, f"plain-{repeat}")
            row = {"predict": timed(partial(predict, predictor, args.images, ours))}
            row["plain"] = timed(partial(plain, predictor, args.images, loop))
            rows.append(row)
        names = list(samples_of(args.images, None)[0])
        pairs = [(ours / "masks" / f"{name}.png", loop / f"{name}.png") for name in names]
        same = np.mean([(np.asarray(Image.open(a)) == np.asarray(Image.open(b))).mean() for a, b in pairs])
    rows = rows[1:]
    ratios = [row["plain"][0] / row["predict"][0] for row in rows]
    per_image = {
        f"{way}_{what}": statistics.median(row[way][number] for row in rows) / len(names)
        for way in ("predict", "plain")
        for number, what in enumerate(("seconds", "processor_seconds"))
    }
    record = {
        "model": Path(args.model).name, "images": len(names), "threads": args.threads,
        "crop_size": predictor.how.crop_size, "long_edge": predictor.how.long_edge,
        "ratio": statistics.median(ratios), "ratios": ratios, "per_image": per_image, "equal_pixels": float(same),
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    if args.output:
        write_json(args.output, record)
    print(json.dumps({key: value for key, value in record.items() if key != "versions"}, indent=1))


if __name__ == "__main__":
    main()

"""Apply a trained model to a folder of images: the main of `hf-dbp predict`, and `hf_dbp.predict`, for any task.

    hf-dbp predict MODEL IMAGES --output_dir OUT

1. The model's config.json tells its task; the task's module loads it as a `Predictor` (`TASKS`).
2. Threads open images while the model works on others. The predictor gets them as one stream and returns results in
   order. Each result is written at once: first its files, under temporary names and then renamed, then one line in
   `OUT/done.jsonl`. So a killed run leaves no partial file, and the repeated command does only the rest.
3. At the end the rows of all images become one table, `OUT/predictions.csv` (or .parquet), and `OUT/predictions.json`
   records model, settings, unreadable images and, if masks were given, scores.

To add a task, write a module with ``load(model, **settings) -> Predictor`` and add it to `TASKS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import os
import shlex
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from tqdm.auto import tqdm

from hf_dbp.data.arguments import FolderFlags
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.folders import IMAGE_FILES, Samples, open_pictures
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.whole_files import clear_parts, whole_file
from hf_dbp.downstream.segmentation.source import LabelFlags
from hf_dbp.errors import UserError, command
from hf_dbp.flags import flags_of
from hf_dbp.hub.untrusted import read_json
from hf_dbp.locking import one_writer
from hf_dbp.records import finite, versions, write_json

__all__ = ["Predictions", "Predictor", "load_predictor", "main", "predict"]

logger = logging.getLogger(__name__)

SYNC = 1.0  # seconds between writes of the journal to the disk; a killed process loses nothing in between
DONE, RECORD, TABLE = "done.jsonl", "predictions.json", "predictions"
#: what an architecture's name in config.json ends in: the module that predicts with it
TASKS = {
    "ForSemanticSegmentation": "hf_dbp.downstream.segmentation.predictor",
    "EomtForUniversalSegmentation": "hf_dbp.downstream.segmentation.predictor",
    "ForImageClassification": "hf_dbp.downstream.classification.predictor",
    "ForObjectDetection": "hf_dbp.downstream.detection.predictor",
    "ForInstanceSegmentation": "hf_dbp.downstream.detection.predictor",
}
#: what lies beside the encoder of a model that is no stock class: the module that predicts with it
BESIDE = {"retrieval.json": "hf_dbp.downstream.segmentation.predictor"}
Row = dict[str, Any]


class Predictor(Protocol):
    """A loaded model and what its task does with an image.

    Attributes:
        settings: everything that affects the results, as JSON; results with other settings are not mixed in.
    """

    settings: Mapping[str, Any]

    def open(self, name: str, files: Sequence[str]) -> Any:
        """Open an image for the model; called in threads. UnreadableImageError if it cannot be read."""

    def predict(self, images: Iterable[Any]) -> Iterator[Any]:
        """The results of opened images, in order, as they come."""

    def write(self, result: Any, folder: Path) -> list[Row]:
        """Write a result's files below ``folder`` (temporary name, then rename); return its rows of the table."""

    def finish(self, rows: Sequence[Row], folder: Path) -> dict[str, Any]:
        """Write what concerns all images, once they are done; return entries for the record."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The results of a prediction.

    Attributes:
        folder: the folder with all files.
        table: the file of the table.
        rows: the rows of the table.
        record: the content of `predictions.json`.
    """

    folder: Path
    table: Path
    rows: list[Row]
    record: dict[str, Any]


def load_predictor(model: str, **settings: Any) -> Predictor:
    """The predictor for a model.

    Args:
        model: folder or Hub id.
        settings: the task's own, see ``load`` in the modules of `TASKS`.

    Raises:
        UserError: there is no such model, or this library does not predict its task.
    """
    found = read_json(model, "config.json")
    if found is None:
        raise UserError(f"{model} holds no config.json; give a folder or a Hub id of a model")
    architectures = [str(name) for name in found[1].get("architectures") or []]
    modules = [TASKS[ending] for name in architectures for ending in TASKS if name.endswith(ending)]
    modules += [module for file, module in BESIDE.items() if (Path(model) / file).is_file()]
    if not modules:
        raise UserError(
            f"{found[0]} is of {', '.join(architectures) or 'no architecture'}: predict takes models of "
            f"{', '.join(TASKS)} and folders of `hf-dbp retrieve`; make one with `hf-dbp finetune`, `hf-dbp classify`, "
            "`hf-dbp detect` or `hf-dbp retrieve`"
        )
    if modules[0] != TASKS["ForObjectDetection"] and settings.pop("threshold", None) is not None:
        raise UserError(f"--threshold is the lowest score of an object; {model} is not a detector")
    predictor: Predictor = importlib.import_module(modules[0]).load(model, **settings)
    return predictor


def predict(
    model: str | Predictor,
    images: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    channel_files: Sequence[str] | None = None,
    table: str = "csv",
    **settings: Any,
) -> Predictions:
    """Apply a model to an image or a folder of images; results already in ``output_dir`` are kept.

    Args:
        model: folder or Hub id, or a predictor from `load_predictor`.
        images: a picture file, or a folder of pictures with any subfolders.
        output_dir: folder for masks, overlays, table and record.
        channel_files: for a folder with one file per channel, a name pattern for each.
        table: ``csv`` or ``parquet``.
        settings: as for `load_predictor`.

    Raises:
        UserError: there is no such model or image, none of the images can be read, or ``output_dir`` holds results of
            another model or other settings, or another process writes there.
    """
    where = os.fspath(images)
    predictor = load_predictor(model, images=where, **settings) if isinstance(model, str) else model
    (samples, left_out), folder = samples_of(where, channel_files), Path(output_dir)
    left_out.warn(where)
    if Path(where).is_dir() and folder.resolve().is_relative_to(Path(where).resolve()):
        raise UserError(
            f"--output_dir {folder} lies in the folder of images, where its masks would count as images next time; "
            "give one outside"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder):
        return predicted(predictor, samples, left_out, folder, table)


def predicted(predictor: Predictor, samples: Samples, left_out: LeftOut, folder: Path, table: str) -> Predictions:
    """Predict the images that are not done, and write the table and the record. UserError as for `predict`."""
    clear_parts(folder)
    done = read_done(folder / DONE, predictor.settings)
    left = {name: files for name, files in samples.items() if name not in done}
    unreadable: dict[str, str] = {}
    started = synced = time.monotonic()
    with (folder / DONE).open("a", encoding="utf-8") as journal:
        if not done:
            note(journal, {"settings": finite(predictor.settings)})
        for name, found in finished(predictor, left, folder, unreadable, len(samples)):
            rows = finite(found)  # as a resumed run reads them back
            note(journal, {"image": name, "rows": rows})
            done[name] = rows
            if time.monotonic() - synced > SYNC:
                os.fsync(journal.fileno())
                synced = time.monotonic()
    seconds = time.monotonic() - started
    rows = [row for name in samples if name in done for row in done[name]]
    record = {
        "schema": 1,
        **predictor.settings,
        "images": len([name for name in samples if name in done]),
        "unreadable": {"count": len(unreadable), "images": unreadable},
        "left_out": left_out.record(),
        **predictor.finish(rows, folder),
        "seconds": round(seconds, 3),
        "images_of_this_run": len(left) - len(unreadable),
        "versions": versions(),
    }
    write_json(folder / RECORD, record)
    if not record["images"]:
        raise UserError(f"none of the {len(samples)} images can be read, e.g. {next(iter(unreadable.values()))}")
    file = write_table(rows, folder / f"{TABLE}.{table}")
    return Predictions(folder, file, rows, record)


def samples_of(images: str, channel_files: Sequence[str] | None) -> tuple[Samples, LeftOut]:
    """The images by name, one file or all below a folder, and what is left out. UserError if there are none."""
    path = Path(images)
    if path.is_file() and not channel_files:
        if path.suffix.lower() not in IMAGE_FILES:
            raise UserError(f"{images} is not a picture ({', '.join(sorted(IMAGE_FILES))})")
        return {path.stem: (str(path),)}, LeftOut()
    folder = open_pictures(images)
    return folder.named(path, folder.files, channel_files), folder.left_out


def note(journal: Any, entry: Mapping[str, Any]) -> None:
    """Append a line to the list of images whose prediction is done, so that it survives a crash."""
    journal.write(json.dumps(entry, allow_nan=False) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def read_done(file: Path, settings: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of the images already predicted; a last line cut off by a crash is removed from the file.

    Raises:
        UserError: they come from another model or other settings.
    """
    if not file.is_file():
        return {}
    whole, _, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        os.truncate(file, len(whole) + 1 if whole else 0)
    entries = [json.loads(line) for line in whole.splitlines()]
    if not entries:
        return {}
    before, now = entries[0]["settings"], json.loads(json.dumps(finite(settings), allow_nan=False))
    changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    if changed:
        name = sorted(changed)[0]
        raise UserError(
            f"{file.parent} holds predictions with {name} {before.get(name)!r:.80}, not {now.get(name)!r:.80}: "
            "give another --output_dir, or remove that folder"
        )
    return {entry["image"]: entry["rows"] for entry in entries[1:]}


def finished(
    predictor: Predictor, samples: Samples, folder: Path, unreadable: dict[str, str], total: int
) -> Iterator[tuple[str, list[Row]]]:
    """Each predicted image with its rows, after its files are written; threads open and write, this one predicts."""
    names: deque[str] = deque()
    threads = min(4, (os.cpu_count() or 1) + 1)
    progress = tqdm(total=total, initial=total - len(samples), desc="Images", unit="image")
    with ThreadPoolExecutor(threads) as pool, progress:

        def opened() -> Iterator[Any]:
            waiting: deque[tuple[str, Future[Any]]] = deque()
            queue = iter(samples.items())
            while True:
                while len(waiting) < threads and (sample := next(queue, None)) is not None:
                    waiting.append((sample[0], pool.submit(predictor.open, *sample)))
                if not waiting:
                    return
                name, image = waiting.popleft()
                try:
                    item = image.result()
                except UnreadableImageError as error:
                    unreadable[name] = str(error)
                    logger.warning("left out an image that cannot be read: %s", error)
                    progress.update()
                    continue
                names.append(name)
                yield item

        writing: deque[tuple[str, Future[list[Row]]]] = deque()
        for result in predictor.predict(opened()):
            writing.append((names.popleft(), pool.submit(predictor.write, result, folder)))
            while writing and (writing[0][1].done() or len(writing) > threads):
                name, rows = writing.popleft()
                yield name, rows.result()
                progress.update()
        for name, rows in writing:
            yield name, rows.result()
            progress.update()


def write_table(rows: Sequence[Row], file: Path) -> Path:
    """Write the rows of predictions as CSV or parquet, depending on the name of the file."""
    write = pq.write_table if file.suffix == ".parquet" else csv.write_csv
    with whole_file(file) as part:
        write(pa.Table.from_pylist(list(rows)), part)
    return file


def report(found: Predictions) -> str:
    """The results of a prediction and what to do next, to print at the end of the command."""
    record, where = found.record, shlex.quote(str(found.folder))
    lines = [f"{record['images']} images, {record['images_of_this_run']} of them now, in {record['seconds']:.1f} s"]
    if record["unreadable"]["count"]:
        first = next(iter(record["unreadable"]["images"].values()))
        lines.append(f"left out   {record['unreadable']['count']} that cannot be read, e.g. {first}")
    if "mean_iou" in record:
        lines.append(f"mean IoU   {record['mean_iou']:.4f} over the given masks")
    if "map" in record:
        mean, half = (f"{record[key]:.4f}" if record[key] is not None else "-" for key in ("map", "map_50"))
        lines.append(f"mAP        {mean}, AP50 {half} over {record['scored_images']} labelled images")
    for name, count in record.get("counts", {}).items():
        lines.append(f"           {count:6d}  {name}")
    lines.append(f"written    {', '.join([str(found.table), RECORD, *record['files']])} in {where}")
    return "\n".join([*lines, f"next       {record['next']}"])


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse and predict. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    declared = [flags_of(FolderFlags, "channel_files", "mask_suffix"), flags_of(LabelFlags, "palette")]
    parser = argparse.ArgumentParser(
        prog="hf-dbp predict", description="Apply a trained model to new images.", parents=declared
    )
    parser.add_argument(
        "model", help="Folder or Hub id of a model of hf-dbp finetune, classify, detect or retrieve, or a stock one."
    )
    parser.add_argument("images", help="A picture file, or a folder of pictures with any subfolders.")
    parser.add_argument("--output_dir", required=True, help="Folder for masks, overlays and the table.")
    parser.add_argument("--masks", help="True masks or labels of the images, to score the predictions.")
    parser.add_argument(
        "--ignore_index", type=int, help="Id of the true masks that is not scored (default: the model's)."
    )
    parser.add_argument("--crop_size", type=int, help="Side of the windows (default: as the model was evaluated).")
    parser.add_argument(
        "--long_edge", type=int, help="Long edge to scale images to; 0: native (default: as the model was evaluated)."
    )
    parser.add_argument("--batch_size", type=int, help="Windows per forward pass (default: as it was evaluated).")
    parser.add_argument("--device", help="cpu, cuda ... (default: a GPU if there is one).")
    parser.add_argument("--table", default="csv", choices=["csv", "parquet"], help="Format of the table.")
    parser.add_argument(
        "--export", nargs="+", default=[], choices=["coco", "labelme"], help="Also write labels to correct by hand."
    )
    parser.add_argument(
        "--threshold", type=float, help="Lowest score of an object that is kept (default: 0.3; 0 with --masks)."
    )
    parser.add_argument("--no_overlays", action="store_true", help="Write no overlays.")
    args = vars(parser.parse_args(arguments))
    how = {name: args.pop(name) for name in ("model", "images", "output_dir", "channel_files", "table")}
    found = predict(**how, **args)
    print(report(found))
    return found.record

"""Choose the images whose labels teach most about the rest: the main of `hf-dbp select`.

    hf-dbp embed VIT IMAGES -o table.parquet
    hf-dbp select table.parquet --budget 40 --output_dir outputs/selection

Similarity is the cosine of centred features, as in `hf_dbp.downstream.neighbours`. Three ways to choose b images:

- ``typical`` (Hacohen et al. 2022, TypiClust): k-means into b clusters plus one for each labelled image; then, from
  each cluster without a labelled image, largest first, the image most similar to its 20 nearest neighbours in the
  cluster.
- ``k_centre`` (Sener & Savarese 2018): repeatedly the image least similar to all chosen or labelled ones; the first is
  the one most similar to all others. It also finds outliers.
- ``random``, for comparison.

Near-duplicates and unreadable images are never chosen. Shapes: N images, D features, b images to choose.
"""

from __future__ import annotations

import argparse
import csv
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor

from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.images import ImageSource
from hf_dbp.data.one_split import open_images
from hf_dbp.downstream.embedding import Embeddings, read_embeddings
from hf_dbp.downstream.neighbours import centred, nearest
from hf_dbp.errors import UserError, command
from hf_dbp.flags import flags_of
from hf_dbp.hub.arguments import HubFlags
from hf_dbp.inspection.contact_sheet import thumbnail, write_pictures

__all__ = ["METHODS", "coverage", "main", "select_images", "write_selection"]

logger = logging.getLogger(__name__)

NEIGHBOURS = 20  # neighbours that define typicality, as published
STARTS = 10  # starts of k-means
SHOWN = 60  # pictures in the contact sheet


def typical(features_ND: Tensor, count: int, labelled: Sequence[int], seed: int) -> list[int]:
    """Rows of the most typical image of each uncovered cluster, largest clusters first."""
    clusters = min(count + len(labelled), len(torch.unique(features_ND, dim=0)))
    cluster_N = best_clusters(features_ND.numpy(), clusters, seed)
    sizes = np.bincount(cluster_N, minlength=clusters)
    sizes[cluster_N[list(labelled)]] = 0
    chosen = []
    for cluster in np.argsort(-sizes, kind="stable")[:count]:
        members = np.flatnonzero(cluster_N == cluster)
        if sizes[cluster]:
            similarity, _ = nearest(features_ND[members], features_ND[members], NEIGHBOURS + 1)
            chosen.append(int(members[int(similarity.mean(dim=1).argmax())]))
    return chosen + k_centre(features_ND, count - len(chosen), [*labelled, *chosen], seed)


def best_clusters(features_ND: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.int32]:
    """The cluster of each row (N), from the best of several k-means runs; some clusters may be empty."""
    found: list[tuple[float, NDArray[np.int32]]] = []
    for start in range(STARTS):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            centres, cluster_N = kmeans2(features_ND, clusters, minit="++", seed=seed * STARTS + start)
        found.append((float(np.square(features_ND - centres[cluster_N]).sum()), cluster_N))
    return min(found, key=lambda one: one[0])[1]


def k_centre(features_ND: Tensor, count: int, labelled: Sequence[int], seed: int) -> list[int]:
    """Rows of the images least similar to all before them."""
    chosen: list[int] = []
    closest_N = torch.full((len(features_ND),), -torch.inf)
    for row in labelled:
        closest_N = torch.maximum(closest_N, features_ND @ features_ND[row])
    while len(chosen) < count:
        if not (chosen or labelled):
            row = int((features_ND @ features_ND.sum(dim=0)).argmax())
        else:
            closest_N[[*labelled, *chosen]] = torch.inf
            row = int(closest_N.argmin())
        chosen.append(row)
        closest_N = torch.maximum(closest_N, features_ND @ features_ND[row])
    return chosen


def at_random(features_ND: Tensor, count: int, labelled: Sequence[int], seed: int) -> list[int]:
    """Rows of images to label, drawn at random."""
    order = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(features_ND)), list(labelled)))
    return [int(row) for row in order[:count]]


METHODS: dict[str, Callable[[Tensor, int, Sequence[int], int], list[int]]] = {
    "typical": typical,
    "k_centre": k_centre,
    "random": at_random,
}


def select_images(
    table: Embeddings, budget: int, method: str = "typical", labelled: Sequence[str] = (), seed: int = 0
) -> list[int]:
    """Choose images to label.

    Args:
        table: from `read_embeddings`.
        budget: b, the number of images.
        method: one of `METHODS`.
        labelled: names of images that already have labels.
        seed: seed of k-means or the draw.

    Returns:
        Indices into the table (into `table.names`), the most representative first.

    Raises:
        UserError: there are fewer images than the budget, or labelled images are not in the table.
    """
    number = {name: index for index, name in enumerate(table.names)}
    unknown = [name for name in labelled if name not in number]
    if unknown:
        raise UserError(
            f"{len(unknown)} labelled images are not in the table, e.g. {unknown[0]!r}; it has {table.names[0]!r}"
        )
    known = {number[name] for name in labelled}
    candidates = [i for i, first in enumerate(table.duplicate_of) if first is None or i in known]
    if not 0 < budget <= len(candidates) - len(known):
        raise UserError(
            f"--budget {budget}: {len(candidates) - len(known)} images are left to choose from, without near-copies "
            f"({len(table.names) - len(candidates)}) and labelled ones ({len(known)}); give 1 to that many"
        )
    place = {index: position for position, index in enumerate(candidates)}
    features_ND = centred(table.features_ND)[candidates]
    rows = METHODS[method](features_ND, budget, sorted(place[index] for index in known), seed)
    return [candidates[row] for row in rows]


def coverage(table: Embeddings, chosen: Sequence[int]) -> tuple[float, NDArray[np.int64]]:
    """Mean cosine of the images to the most similar chosen one, and how many images each chosen one represents (b)."""
    features_ND = centred(table.features_ND)
    similarity_N1, row_N1 = nearest(features_ND[list(chosen)], features_ND, 1)
    return float(similarity_N1.mean()), np.bincount(row_N1[:, 0].numpy(), minlength=len(chosen))


def write_selection(folder: Path, table: Embeddings, chosen: Sequence[int], token: str | None = None) -> list[str]:
    """Write `selection.csv` and `contact_sheet.png`; return the names of the files.

    The contact sheet opens the images where the table found them; if they are gone, it is left out with a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _, stands_for = coverage(table, chosen)
    with (folder / "selection.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "row", "name", "stands_for"])
        for rank, index in enumerate(chosen):
            writer.writerow([rank + 1, int(table.rows[index]), table.names[index], int(stands_for[rank])])
    try:
        pictures = thumbnails(table, chosen[:SHOWN], stands_for, token)
    except UserError as error:
        logger.warning("no contact sheet: %s", error)
        return ["selection.csv"]
    write_pictures(folder / "contact_sheet.png", pictures)
    return ["selection.csv", "contact_sheet.png"]


def thumbnails(
    table: Embeddings, chosen: Sequence[int], stands_for: NDArray[np.int64], token: str | None
) -> list[tuple[str, NDArray[Any]]]:
    data = table.record["data"]
    images = open_images(ImageSource(**data["source"], token=token), data["split"])
    pictures = []
    for rank, index in enumerate(chosen):
        try:
            picture = thumbnail(images[int(table.rows[index])])
        except (UnreadableImageError, IndexError) as error:
            raise UserError(f"{table.names[index]} can no longer be read") from error
        pictures.append((f"{rank + 1}: {Path(table.names[index]).stem[-16:]} (for {stands_for[rank]})", picture))
    return pictures


@command
def main(arguments: Sequence[str] | None = None) -> list[str]:
    """Parse, choose and write; return the names. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(
        prog="hf-dbp select", description="Choose which images to label first.", parents=[flags_of(HubFlags, "token")]
    )
    parser.add_argument("table", help="Parquet file of hf-dbp embed.")
    parser.add_argument("--budget", type=int, required=True, help="How many images you will label.")
    parser.add_argument("--method", choices=list(METHODS), default="typical", help="See the documentation.")
    parser.add_argument("--labelled", help="Text file with the names of images that already have labels, one per line.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of k-means and of the random choice.")
    parser.add_argument("--output_dir", default="outputs/selection", help="Folder for the list and the contact sheet.")
    args = parser.parse_args(arguments)
    table = read_embeddings(args.table)
    labelled = [] if args.labelled is None else Path(args.labelled).read_text(encoding="utf-8").splitlines()
    chosen = select_images(table, args.budget, args.method, [name for name in labelled if name], args.seed)
    written = write_selection(Path(args.output_dir), table, chosen, args.token)
    blind = [coverage(table, at_random(table.features_ND, args.budget, (), seed))[0] for seed in range(20)]
    print(
        f"chosen      {len(chosen)} of {len(table.names)} images ({args.method})\n"
        f"coverage    mean cosine of an image to the most similar chosen one: {coverage(table, chosen)[0]:.3f} (for "
        f"20 random choices: {np.mean(blind):.3f}, from {min(blind):.3f} to {max(blind):.3f})\n"
        f"written     {' and '.join(written)}, in {args.output_dir}\n"
        "next        label these images and give them, with their masks, to hf-dbp retrieve or hf-dbp finetune"
    )
    return [table.names[index] for index in chosen]

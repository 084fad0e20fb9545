"""`SegmentationSource`: which labelled images to load, and the names of their classes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from hf_dbp.data.images import BUILT_IN, ImageSource
from hf_dbp.data.labels.masks import is_labels, mask_folder
from hf_dbp.data.masks import Palette
from hf_dbp.data.wire_bonding import CLASS_NAMES
from hf_dbp.errors import UserError
from hf_dbp.natures import Nature

__all__ = ["LabelFlags", "SegmentationSource"]


@dataclass
class LabelFlags:
    """Where the labels of images are, and what they mean."""

    train_mask_dir: Annotated[str | None, Nature("data")] = field(
        default=None,
        metadata={"help": "Folder of masks named like the images of train_dir, or labels (COCO, LabelMe, YOLO, CVAT)."},
    )
    validation_mask_dir: Annotated[str | None, Nature("data")] = field(
        default=None, metadata={"help": "As train_mask_dir, for validation."}
    )
    background_dir: Annotated[str | None, Nature("data")] = field(
        default=None,
        metadata={"help": "Folder of good images, without any defect: they need no masks and count as class 0."},
    )
    palette: Annotated[str | None, Nature("data")] = field(
        default=None,
        metadata={"help": "Colour masks: YAML file of class names and colours. 0/255 masks: binary."},
    )
    annotation_column_name: Annotated[str | None, Nature("data")] = field(
        default=None, metadata={"help": "Column of the masks (default: annotation, mask, label or segmentation)."}
    )
    num_labels: Annotated[int | None, Nature("data")] = field(
        default=None, metadata={"help": "Number of classes, without an ignored one."}
    )
    id2label: Annotated[str | None, Nature("data")] = field(
        default=None, metadata={"help": 'JSON file of class names, a list or {"0": name, ...}.'}
    )
    ignore_index: Annotated[int, Nature("data")] = field(
        default=255, metadata={"help": "Label id that is neither learned nor scored."}
    )
    reduce_labels: Annotated[bool, Nature("data")] = field(
        default=False, metadata={"help": "Move label ids down by one; 0 becomes ignore_index (ADE20K)."}
    )


@dataclass
class SegmentationSource(LabelFlags, ImageSource):
    """Which labelled images to load.

    Masks are paired with images as `hf_dbp.data.masks.pair_folders` does. In their place labels may lie in
    ``train_mask_dir``, as `hf_dbp.data.labels.formats` reads them: they are drawn into a folder of masks. Where
    ``reduce_labels`` moves ids down by one, names of ids as they are stored move with them: those of a palette, of the
    built-in images, and of ``id2label`` if they are one more than ``num_labels``.
    """

    label_names: list[str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_mask_dir is not None and self.train_dir is None:
            raise UserError("--train_mask_dir needs --train_dir, the folder of the images; give both")
        if (self.validation_dir is None) != (self.validation_mask_dir is None) and self.train_mask_dir is not None:
            raise UserError("--validation_dir and --validation_mask_dir belong together; give both or neither")
        if self.background_dir is not None and self.reduce_labels:
            raise UserError(
                "--background_dir labels images as class 0, which --reduce_labels ignores; give one of them"
            )
        self._draw_labels()

    def _draw_labels(self) -> None:
        """Replace labels by the masks drawn from them; those of validation use the same names."""
        if self.train_mask_dir is not None and is_labels(self.train_mask_dir):
            folder, self.label_names = mask_folder(self.train_mask_dir, str(self.train_dir), None, self.cache_dir)
            self.train_mask_dir = folder
        if self.validation_mask_dir is not None and is_labels(self.validation_mask_dir):
            names = list(self.class_names().values())
            folder, _ = mask_folder(self.validation_mask_dir, str(self.validation_dir), names, self.cache_dir)
            self.validation_mask_dir = folder

    def class_names(self) -> dict[int, str]:
        """Return class names by the learned ids, or "class 7" if a name is unknown.

        Raises:
            UserError: there are neither names nor a number of classes, the file of names is invalid, or with
                `reduce_labels` it is unclear whether the names are those before or after the move.
        """
        if self.palette is not None:
            return self._moved(Palette(self.palette, self.ignore_index).names)
        if self.id2label is not None:
            names = _read_names(self.id2label)
            if not self.reduce_labels or self.num_labels == len(names):
                return names
            if self.num_labels == len(names) - 1:
                return self._moved(names)
            raise UserError(
                f"--reduce_labels moves ids down by one; which ids do the {len(names)} names in {self.id2label} "
                f"belong to? Pass --num_labels {len(names)} if they name the remaining classes, or --num_labels "
                f"{len(names) - 1} if the first, {names.get(0)!r}, names id 0, which is not learned"
            )
        if self.dataset_name == BUILT_IN:
            return self._moved(dict(enumerate(CLASS_NAMES)))
        if self.label_names is not None:
            return self._moved(dict(enumerate(self.label_names)))
        if self.num_labels is None:
            raise UserError(
                "the number of classes is unknown: pass --num_labels K, --id2label NAMES.json or --palette FILE"
            )
        return {number: f"class {number}" for number in range(self.num_labels)}

    def _moved(self, names: dict[int, str]) -> dict[int, str]:
        """Names of stored ids, moved as `reduce_labels` moves the ids."""
        return {number - 1: name for number, name in names.items() if number} if self.reduce_labels else names


def _read_names(path: str) -> dict[int, str]:
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(names, list):
            return {number: str(name) for number, name in enumerate(names)}
        return {int(number): str(name) for number, name in names.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f'--id2label {path} is not a JSON list of names or {{"0": name, ...}}: {error}') from error

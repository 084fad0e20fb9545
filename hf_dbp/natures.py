"""What a flag does to a run, stated where the flag is declared and read by everything that treats flags differently.

    eta: Annotated[float, Nature("training", "told", card="learning rate of R (eta)", dbp=True)] = field(default=5e-4)

It is an annotation because transformers' parser passes the metadata of a field to argparse. We cannot annotate the
fields of transformers' `TrainingArguments`, so their natures are one table, ``STOCK`` of
`hf_dbp.training.arguments.RunArguments`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

__all__ = ["Nature", "natures"]


@dataclasses.dataclass(frozen=True)
class Nature:
    """What a flag does to a run.

    Args:
        shapes: what it determines. ``method``: how the model is trained, which comparisons compare. ``data``: the
            images to learn from and measure on. ``model``: the network and its initial weights. ``training``:
            everything else that the result depends on. ``chance``: a seed; runs that differ only in it repeat one
            another. ``nothing``: where, how fast and with which permissions a run is made.
        on_resume: what a resumed run does if the value differs from its checkpoint's: resume and say so (``told``), or
            end (``refused``). Also ``ignored`` if another check refuses it, such as that of the tensors' shapes.
        card: its name in the model card; without one it has no row.
        card_if_off: whether it has a row if it is off.
        dbp: whether it matters only for decorrelated training.
        common: whether ``--help`` shows it although transformers declares it.
    """

    shapes: Literal["method", "data", "model", "training", "chance", "nothing"] = "nothing"
    on_resume: Literal["told", "refused", "ignored"] = "ignored"
    card: str = ""
    card_if_off: bool = False
    dbp: bool = False
    common: bool = False


@functools.cache
def natures(*groups: type) -> dict[str, Nature]:
    """The natures of the flags of these classes of arguments, by name; a field of TrainingArguments may have none.

    A flag that a class redeclares, with another default or help text, keeps its nature unless that is redeclared too.
    """
    found: dict[str, Nature] = {}
    for kind in (kind for group in groups for kind in reversed(group.__mro__)):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            for note in get_args(hint) if get_origin(hint) is Annotated else ():
                if isinstance(note, Nature):
                    found[name] = note
        found |= vars(kind).get("STOCK", {})
    return found

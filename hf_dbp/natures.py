"""What a flag does to a run, said where the flag is declared; everything that treats flags differently reads it here.

    eta: Annotated[float, Nature("training", "told", card="learning rate of R (eta)", dbp=True)] = field(default=5e-4)

It is an annotation because transformers' parser hands whatever the metadata of a field hold to argparse. The fields of
transformers' `TrainingArguments` are not ours to annotate: their natures are one table, ``STOCK`` of
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
        shapes: what follows from it. ``method``: how the model is trained, which is what comparisons compare. ``data``:
            which images are learned from and measured on. ``model``: the network and the weights that it starts from.
            ``training``: everything else that the result depends on. ``chance``: a seed; runs that differ in it alone
            repeat one another. ``nothing``: where, how fast and with what rights a run is made.
        on_resume: what a resumed run does about another value than its checkpoint's: go on and say so (``told``), or
            end (``refused``). ``ignored`` too where another check refuses it, such as that of the tensors' shapes.
        card: what the model card calls it; no row without.
        card_if_off: whether it has a row where it is off.
        dbp: whether it counts for decorrelated training alone.
        common: whether ``--help`` shows it though transformers declares it.
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

    A flag that a class declares again, with another default or help text, keeps its nature unless that is said again.
    """
    found: dict[str, Nature] = {}
    for kind in (kind for group in groups for kind in reversed(group.__mro__)):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            for note in get_args(hint) if get_origin(hint) is Annotated else ():
                if isinstance(note, Nature):
                    found[name] = note
        found |= vars(kind).get("STOCK", {})
    return found

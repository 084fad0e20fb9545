"""The old names of 0.1.0's modules, which keep working for one version, with a DeprecationWarning.

`import hf_dbp.segmentation.upernet` gives the module `hf_dbp.downstream.segmentation.upernet` itself, not a copy, and
`python -m hf_dbp.model_card` runs it. Names that scripts and guides of 0.1.0 import from a module that no longer has
them are `NAMES`. Remove this module with 0.3.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

__all__ = ["MOVED", "NAMES", "install", "moved_names"]

#: name in 0.1.0 -> name now, below hf_dbp; a package moves with all its modules
MOVED = {
    **{
        name: f"training.{name}"
        for name in (
            "arguments", "checkpoints", "clocked", "guards", "measurement", "optimizers", "processes", "resuming",
            "saving", "stopping", "trainer",
        )
    },
    **{name: f"hub.{name}" for name in ("model_card", "publishing", "untrusted", "warm_start")},
    **{name: f"comparison.{name}" for name in ("plans", "report", "statistics")},
    **{name: f"downstream.{name}" for name in ("probe", "segmentation")},
    "contact_sheet": "inspection.contact_sheet",
    "data.hub_errors": "hub.errors",
    "data.survey": "inspection.survey",
}  # fmt: skip

#: module -> name that it had in 0.1.0 -> module and name of its successor, below hf_dbp
NAMES = {
    "comparison": {name: ("comparison.runner", name) for name in ("Runner", "main", "run_plan")},
    "comparison.plans": {
        **{
            name: ("comparison.runs", name)
            for name in ("PROBE_FILE", "RunsBySeed", "best_settings", "collect_runs", "read_run", "variant_of")
        },
        "EVALUATION": ("comparison.heads", "EVALUATION"),
    },
    "inspection": {name: ("inspection.folder", name) for name in ("inspect_folder", "main")},
    "training.guards": {"GuardedTrainer": ("training.resuming", "ResumingTrainer")},
}


def moved_names(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module (PEP 562) that finds the successors of its names in 0.1.0."""

    def find(name: str) -> Any:
        where, new = NAMES[module.removeprefix("hf_dbp.")].get(name, (None, name))
        if where is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now hf_dbp.{where}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(f"hf_dbp.{where}"), new)

    return find


def new_name(name: str) -> str | None:
    """The new name of a module of 0.1.0; None for any other module."""
    package, _, rest = name.partition(".")
    if package != "hf_dbp":
        return None
    for old, new in MOVED.items():
        if rest == old or rest.startswith(f"{old}."):
            return f"hf_dbp.{new}{rest.removeprefix(old)}"
    return None


class Alias(Loader):
    """Loads the module that has replaced an old name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self.name}", DeprecationWarning, stacklevel=2)
        self.spec = importlib.import_module(self.name).__spec__
        return sys.modules[self.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has overwritten it

    def get_code(self, name: str) -> CodeType | None:
        """The module's code, for ``python -m``."""
        spec = importlib.util.find_spec(self.name)
        loader: Any = spec.loader if spec is not None else None
        code: CodeType | None = loader.get_code(self.name)
        return code


class Finder(MetaPathFinder):
    """Finds modules by their names in 0.1.0."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = new_name(fullname)
        found = None if new is None else importlib.util.find_spec(new)
        return None if new is None or found is None else ModuleSpec(fullname, Alias(new), origin=found.origin)


def install() -> None:
    """Make the names of 0.1.0 importable, ahead of the file finder, which would load a second copy of a submodule."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())

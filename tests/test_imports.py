"""What importing costs, and the names of 0.1.0."""

import importlib
import runpy
import subprocess
import sys

import pytest

import hf_dbp
from hf_dbp import _moved

HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib", "codecarbon", "accelerate", "scipy")


def loaded_after(statement: str) -> set[str]:
    """The heavy packages that a fresh process has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    names = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return set(HEAVY) & set(names)


@pytest.mark.parametrize("statement", ["import hf_dbp", "import hf_dbp.cli", "import hf_dbp.errors"])
def test_the_front_door_is_light(statement: str) -> None:
    assert loaded_after(statement) == set()


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_front_door_answers_in_half_a_second_of_work(arguments: list[str]) -> None:
    statement = f"from hf_dbp.cli import main; main({arguments})"
    assert loaded_after(statement) == set()
    code = f"import resource; {statement}; used = resource.getrusage(resource.RUSAGE_SELF); "
    code += "print(used.ru_utime + used.ru_stime)"
    seconds = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert float(seconds[-1]) < 0.5


def test_the_core_loads_torch_alone() -> None:
    modules = "hf_dbp.functional, hf_dbp.layers, hf_dbp.conversion, hf_dbp.update"
    assert loaded_after(f"import {modules}") == {"torch"}


def test_every_public_name_is_there_and_listed_once() -> None:
    assert sorted(hf_dbp._SOURCES) == sorted(hf_dbp.__all__)
    for name in hf_dbp.__all__:
        assert getattr(hf_dbp, name) is not None
    assert set(hf_dbp.__all__) <= set(dir(hf_dbp))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = hf_dbp.nothing_of_the_kind


@pytest.mark.parametrize("old", [*_moved.MOVED, "segmentation.upernet", "report.tables"])
def test_names_of_0_1_0_are_the_modules_of_today(old: str) -> None:
    name = f"hf_dbp.{old}"
    new = _moved.new_name(name)
    assert new is not None
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is now {new}"):
        module = importlib.import_module(name)
    assert module is importlib.import_module(new)
    assert module.__spec__.name == new


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in _moved.NAMES.items() for name in names]
)
def test_names_that_left_their_module_are_found(module: str, name: str) -> None:
    where, new = _moved.NAMES[module][name]
    with pytest.warns(DeprecationWarning, match=rf"hf_dbp.{module}.{name} is now hf_dbp.{where}.{new}"):
        found = getattr(importlib.import_module(f"hf_dbp.{module}"), name)
    assert found is getattr(importlib.import_module(f"hf_dbp.{where}"), new)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = importlib.import_module(f"hf_dbp.{module}").nothing_of_the_kind


def test_a_moved_module_runs_by_its_old_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with ``python -m``."""
    sys.modules.pop("hf_dbp.model_card", None)
    monkeypatch.setattr("sys.argv", ["model_card", "--help"])
    with pytest.raises(SystemExit) as stop, pytest.warns(DeprecationWarning, match="hf_dbp.model_card is now"):
        runpy.run_module("hf_dbp.model_card", run_name="__main__")
    assert not stop.value.code
    assert "card" in capsys.readouterr().out


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hf_dbp.segmentation.no_such_module")

"""What we lean on in other libraries without their promise: read when it changes.

Transformers, accelerate, torch and others may change at any time what they do not publish. These tests find by
themselves

- every method of a foreign class that a class of ours overrides although its name is private, and of
  `transformers.Trainer` every method, public ones too;
- every private attribute of other libraries that the package names;

and compare them with `contract.json`: for each the signature, and a hash of the source as it was when somebody read it
and found that our code still fits. A changed hash is no bug; it means: read it again, then

    python tests/test_contract.py --update

which notes the sources of the versions that are installed. Run it once per version that CI tries.
"""

import ast
import hashlib
import importlib
import inspect
import json
import pkgutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from torch import nn
from transformers import TrainerControl, TrainerState

import hf_dbp
from hf_dbp import pretraining
from hf_dbp.callbacks import DecorrelationCallback
from hf_dbp.downstream.segmentation import finetuning
from hf_dbp.errors import UserError

PACKAGE = Path(hf_dbp.__file__).parent
FILE = Path(__file__).with_name("contract.json")
UPDATE = "read it again, then: python tests/test_contract.py --update"

#: private names that the package uses -> where they are defined
USED = {
    "_actions": "argparse.ArgumentParser",
    "_attn_implementation": "transformers.PretrainedConfig",
    "_current_graph_task_id": "torch._C",
    "_C": "torch",
    "_dynamo": "torch",
    "_exit": "os",
    "_fingerprint": "datasets.Dataset",
    "_indices": "datasets.Dataset",
    "_foreach_add_": "torch",
    "_foreach_copy_": "torch",
    "_foreach_lerp": "torch",
    "_foreach_lerp_": "torch",
    "_foreach_mul_": "torch",
    "_foreach_norm": "torch",
    "_foreach_zero_": "torch",
    "_backward_hooks": "torch.nn.Module",
    "_backward_pre_hooks": "torch.nn.Module",
    "_forward_hooks": "torch.nn.Module",
    "_forward_hooks_always_called": "torch.nn.Module",
    "_forward_pre_hooks": "torch.nn.Module",
    "_forward_pre_hooks_with_kwargs": "torch.nn.Module",
    "_modules": "torch.nn.Module",
    "_version": "torch.Tensor",
    "_dataloaders": "accelerate.Accelerator",
    "_iterator": "torch.utils.data.DataLoader",
    "_MultiProcessingDataLoaderIter": "torch.utils.data.dataloader",
    "_shutdown_workers": "torch.utils.data.dataloader._MultiProcessingDataLoaderIter",
    "_is_mkldnn_bf16_supported": "torch.ops.mkldnn",
    "_is_mkldnn_fp16_supported": "torch.ops.mkldnn",
    "_last_lr": "torch.optim.lr_scheduler.LRScheduler",
    "_n_gpu": "transformers.TrainingArguments",
    "_prepare_inputs": "transformers.Trainer",
    "_train_batch_size": "transformers.Trainer",
    "_raise_exceptions_for_missing_entries": "transformers.utils.hub.cached_files",
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]


def own_names(tree: ast.Module) -> set[str]:
    """The names that a module defines: functions, classes, variables, attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            own = isinstance(node, ast.Name) or (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
            found |= {node.id if isinstance(node, ast.Name) else node.attr} if own else set()
    return found


def used_private_names() -> set[str]:
    """Private names of others: attributes that nothing here defines, imports and keyword arguments."""
    own, found = set[str](), set[str]()
    for tree in trees():
        own |= own_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                found.add(node.arg)
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("hf_dbp"):
                found |= {alias.name for alias in node.names} | set(str(node.module).split("."))
            elif isinstance(node, ast.Import):
                found |= {part for alias in node.names for part in alias.name.split(".")}
    return {name for name in found - own if private(name)}


def own_classes() -> list[type]:
    found = []
    for module in pkgutil.walk_packages(hf_dbp.__path__, "hf_dbp."):
        loaded = importlib.import_module(module.name)
        found += [kind for kind in vars(loaded).values() if inspect.isclass(kind) and kind.__module__ == module.name]
    return found


def overridden() -> dict[str, Any]:
    """Foreign methods that our classes override, by name: the private ones, and all of the Trainer's."""
    found = {}
    for kind in own_classes():
        foreign = [base for base in kind.__mro__ if base.__module__.split(".")[0] not in ("hf_dbp", "builtins")]
        for name in vars(kind):
            base = next((base for base in foreign if inspect.isfunction(vars(base).get(name))), None)
            if base and (private(name) or (base is transformers.Trainer and not name.startswith("__"))):
                found[f"{base.__module__}.{base.__qualname__}.{name}"] = vars(base)[name]
    return found


def holder(place: str) -> Any:
    """The module, class or function of that dotted name."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, attribute = place.rpartition(".")
        return getattr(holder(module), attribute)


def used() -> dict[str, Any]:
    """The private functions of others that are called, by name."""
    found = {}
    for name, place in USED.items():
        if inspect.isroutine(value := getattr(holder(place), name, None)):
            found[f"{place}.{name}"] = value
    return found


def state_of(function: Any) -> dict[str, str]:
    """Signature and hash of the source, as far as there are any: what is written in C has neither."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        return {
            "signature": ", ".join(inspect.signature(function).parameters),
            "source": hashlib.sha256(source.encode()).hexdigest()[:16],
        }
    except (TypeError, ValueError, OSError):
        return {}


def versions_of(name: str) -> str:
    library = name.split(".", maxsplit=1)[0]
    return str(getattr(importlib.import_module(library), "__version__", "the standard library"))


def actual() -> dict[str, dict[str, str]]:
    return {name: state_of(function) for name, function in sorted({**overridden(), **used()}.items())}


KNOWN: dict[str, dict[str, dict[str, str]]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def test_every_private_name_is_known() -> None:
    assert used_private_names() == USED.keys(), f"say in USED what it belongs to, and {UPDATE}"
    assert {*overridden(), *used()} == KNOWN.keys(), (
        f"overridden or called, and not in {FILE.name} or no more: {UPDATE}"
    )


@pytest.mark.parametrize("name", KNOWN)
def test_it_has_the_signature_and_the_body_that_were_read(name: str) -> None:
    state = actual_states().get(name)
    assert state is not None, f"{name} is gone from {versions_of(name)}, or no longer overridden; {UPDATE}"
    readings = KNOWN[name]
    assert state.get("signature") in {one.get("signature") for one in readings.values()}, (
        f"{name} takes other arguments in {versions_of(name)}: {state['signature']}; {UPDATE}"
    )
    assert state in readings.values(), (
        f"the body of {name} in {versions_of(name)} is not that of {', '.join(readings)}; {UPDATE}"
    )


STATES: dict[str, dict[str, str]] = {}


def actual_states() -> dict[str, dict[str, str]]:
    if not STATES:
        STATES.update(actual())
    return STATES


@pytest.mark.parametrize("name", USED)
def test_what_is_named_is_there(name: str) -> None:
    place = holder(USED[name])
    assert hasattr(place, name) or name in inspect.getsource(place), f"{USED[name]} has no {name} any more"


@pytest.mark.parametrize("command", [pretraining.main, finetuning.main])
@pytest.mark.parametrize("flags", [["--fsdp"], ["--fsdp", "full_shard"], ["--deepspeed", "zero.json"]])
def test_sharding_is_refused_with_the_reason(command: Any, flags: list[str], tmp_path: Path, capsys: Any) -> None:
    given = ["--model_size", "mini", "--dataset_name", "wire_bonding", "--output_dir", str(tmp_path), "--do_train"]
    with pytest.raises(SystemExit) as stop:
        command([*given, "--use_cpu", *flags])
    assert stop.value.code == 2
    assert f"error: {flags[0]} splits weights over processes, but the update of R" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_shards_is_refused_in_a_stock_trainer_too(
    launcher: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    args: Any = SimpleNamespace(n_gpu=0, fsdp=None, deepspeed=None)
    with pytest.raises(UserError, match=f"--{launcher.lower()} splits weights"):
        DecorrelationCallback().on_train_begin(args, TrainerState(), TrainerControl(), nn.Linear(2, 2))


def update() -> None:
    """Note the sources of the installed versions beside those of others; forget what is no longer used."""
    now = actual()
    content = {name: KNOWN.get(name, {}) for name in now}
    for name, state in now.items():
        content[name] = {version: one for version, one in content[name].items() if version != versions_of(name)}
        content[name][versions_of(name)] = state
    FILE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    assert sys.argv[1:] == ["--update"], __doc__
    update()

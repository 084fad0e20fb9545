"""The shape of the package: imports point one way, every module says what it offers, nothing private leaks."""

import ast
import re
import subprocess
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_dbp"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The flow, upstream first: a module imports from lines above its own, or from its own line.
FLOW = [
    ["errors"],
    ["functional"],
    ["padding"],
    ["layers"],
    ["conversion"],
    ["update"],
    ["sharing"],
    ["probing"],
    ["any_model"],
    ["config_limits"],
    ["configuration_dbp_vit_mae"],
    ["stock_vit_mae"],
    ["modeling_dbp_vit_mae"],
    ["correlations"],
    ["natures", "precision"],
    ["callbacks"],
]
POSITIONS = {f"hf_dbp.{name}": i for i, names in enumerate(FLOW) for name in names}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    known, found = {name_of(other) for other in MODULES}, set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module}
    return {name for name in found if name.split(".")[0] == "hf_dbp"}


IMPORTS = {name_of(path): imported(path) for path in MODULES if path.name != "__init__.py"}


def test_the_flow_lists_modules_that_exist() -> None:
    assert POSITIONS.keys() <= IMPORTS.keys()


@pytest.mark.parametrize("name", POSITIONS)
def test_imports_point_upstream(name: str) -> None:
    later = {other for other in IMPORTS[name] if POSITIONS.get(other, len(FLOW)) >= POSITIONS[name]}
    assert not later, f"{name} imports from further down the flow: {sorted(later)}"


def test_imports_make_no_circle() -> None:
    remaining = {name: {other for other in others if other in IMPORTS} for name, others in IMPORTS.items()}
    while remaining:
        free = {name for name, others in remaining.items() if not others & remaining.keys()}
        assert free, f"these import one another: {sorted(remaining)}"
        remaining = {name: others for name, others in remaining.items() if name not in free}


def test_the_core_needs_torch_alone() -> None:
    """The method serves any torch model; transformers begins with the ViT-MAE."""
    for name in ("functional", "padding", "layers", "conversion", "update", "sharing", "probing", "any_model"):
        nodes = ast.walk(tree(PACKAGE / f"{name}.py"))
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree(PACKAGE / f"{name}.py")) if isinstance(node, ast.ImportFrom)}
        assert not {module for module in modules if module.split(".")[0] in ("transformers", "numpy", "datasets")}, name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_offers_what_it_has(path: Path) -> None:
    module = tree(path)
    if path.name == "__init__.py" and not module.body:
        return  # a folder and no more
    assert ast.get_docstring(module), f"{path.name} has no docstring"
    if path.name == "__init__.py" and len(module.body) == 1:
        return
    defined, offered = set(), None
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.If):  # TYPE_CHECKING
            defined |= {alias.name for inner in node.body for alias in getattr(inner, "names", ())}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            defined |= names
            if "__all__" in names:
                offered = ast.literal_eval(node.value)
    assert offered is not None, f"{path.name} does not say what it offers in __all__"
    assert not set(offered) - defined, f"{path.name} offers what it does not have"


def test_modules_and_functions_fit_the_reader() -> None:
    """A hint: what is long is listed as a warning, and split only where that makes it clearer."""
    long = []
    for path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        long += [f"{path.name}: {lines} lines"] if lines >= 400 else []
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno
                long += [f"{path.name}: {node.name} {length} lines"] if length >= 70 else []
    if long:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn(f"long: {', '.join(long)}", UserWarning, stacklevel=1)


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports each by its name alone, and collects nothing where two have the same."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_tracked_file_names_a_private_path() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    private = re.compile("/" + r"(work|home|root|Users|tmp)/[\w.]+")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or path.suffix in {".png", ".jpg", ".tif", ".parquet"}:
            continue
        found = private.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{name} names {found.group()}"

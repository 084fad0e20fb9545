"""A mistake of the user's ends in one line; a bug of ours, planted in every command, in its traceback."""

import builtins
import errno
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from hf_dbp import cli
from hf_dbp.errors import REMEDIES, REPORT, UserError, command
from hf_dbp.hub import model_card
from hf_dbp.training.arguments import PretrainingArguments

RUN = [
    *("--dataset_name", "wire_bonding", "--built_in_size", "32", "--max_train_samples", "6", "--max_eval_samples", "2"),
    *("--max_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu", "--report_to", "none"),
    *("--disable_tqdm", "1", "--do_train"),
]
SIZES = "hidden_size=16,num_hidden_layers=4,num_attention_heads=2,intermediate_size=32"
MAE = ["--model_size", "mini", "--image_size", "32", "--patch_size", "8", "--config_overrides", SIZES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step and its stock ViT; a folder of pictures by class."""
    folder = tmp_path_factory.mktemp("errors")
    cli.main(["pretrain", *RUN, *MAE, "--output_dir", str(folder / "run")])
    cli.main(["fuse", str(folder / "run"), "--output_dir", str(folder / "vit"), "--num_images", "2"])
    for name, low in (("dark", 0), ("bright", 120)):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "masks" / name).mkdir(parents=True)
        for number in range(5):
            pixels = np.random.default_rng(number).integers(low, low + 130, (2, 40, 40), dtype=np.uint8)
            tifffile.imwrite(folder / "images" / name / f"{number}.tif", pixels, photometric="minisblack")
            Image.fromarray((pixels[0] > low + 60).astype(np.uint8)).save(folder / "masks" / name / f"{number}.png")
    cli.main(["finetune", *filled_in(FINETUNE, folder, folder / "upernet")])
    cli.main(["embed", str(folder / "vit"), str(folder / "images"), "-o", str(folder / "table.parquet")])
    return folder


FINETUNE = [*RUN, "--model_name_or_path", "VIT", "--crop_size", "32", "--head_size", "8", "--output_dir", "OUT"]

#: command -> its arguments, and the function deep inside it in which a bug is planted
COMMANDS = {
    "inspect": (["IMAGES", "--output_dir", "OUT"], "hf_dbp.inspection.contact_sheet.thumbnail"),
    "pretrain": ([*RUN, *MAE, "--output_dir", "OUT"], "hf_dbp.modeling_dbp_vit_mae.DBPViTMAEForPreTraining.forward"),
    "fuse": (["RUN", "--output_dir", "OUT", "--num_images", "2"], "hf_dbp.layers.DecorrelatedLinear.fuse"),
    "finetune": (FINETUNE, "transformers.UperNetForSemanticSegmentation.forward"),
    "predict": (
        ["UPERNET", "IMAGES", "--output_dir", "OUT"],
        "transformers.UperNetForSemanticSegmentation.forward",
    ),
    "classify": (
        ["IMAGES", *RUN[8:], "--model_name_or_path", "VIT", "--output_dir", "OUT"],
        "transformers.BeitForImageClassification.forward",
    ),
    "detect": (
        ["IMAGES", "MASKS", *RUN[8:], "--model_name_or_path", "VIT", "--num_labels", "2", "--output_dir", "OUT"],
        "transformers.RfDetrForObjectDetection.forward",
    ),
    "retrieve": (
        [
            "--model_name_or_path",
            "VIT",
            "--train_dir",
            "IMAGES",
            "--train_mask_dir",
            "MASKS",
            "--num_labels",
            "2",
            "--output_dir",
            "OUT",
        ],
        "hf_dbp.downstream.segmentation.retrieval.build_memory",
    ),
    "select": (["TABLE", "--budget", "2", "--output_dir", "OUT"], "hf_dbp.downstream.selection.coverage"),
    "export": (["VIT", "IMAGES", "--output_dir", "OUT"], "hf_dbp.downstream.export.write_onnx"),
    "probe": (
        ["--model_name_or_path", "VIT", "--train_dir", "IMAGES", "--output_file", "OUT/probe.json"],
        "hf_dbp.downstream.probe.linear_accuracy",
    ),
    "embed": (["VIT", "IMAGES", "--output_file", "OUT/table.parquet"], "hf_dbp.downstream.embedding.outlier_scores"),
    "compare": (["--runs", "RUN", "--output_dir", "OUT"], "hf_dbp.comparison.report.analysis.chosen_runs"),
    "demo": (["OUT"], "hf_dbp.pretraining.load_images"),
}
BUGS = [
    ValueError("expanded size of the tensor (3) must match"),
    KeyError("pixels"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ImportError("cannot import name 'gone' from 'torch'"),
    FileNotFoundError(errno.ENOENT, "No such file", str(Path(cli.__file__).parent / "recipes" / "gone.yaml")),
    OSError("half of a file"),
]


def filled_in(arguments, trained, out):
    names = {"RUN": "run", "VIT": "vit", "IMAGES": "images", "MASKS": "masks", "UPERNET": "upernet"}
    places = {key: trained / name for key, name in (names | {"TABLE": "table.parquet"}).items()} | {"OUT": out}
    return [str(places[one]) if one in places else one.replace("OUT/", f"{out}/") for one in arguments]


def raising(error):
    def broken(*args, **kwargs):
        raise error

    return broken


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_main_is_wrapped(name):
    assert importlib.import_module(cli.COMMANDS[name]).main.__wrapped__


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_bug_keeps_its_traceback_and_says_where_to_report_it(name, bug, trained, tmp_path, monkeypatch, capfd):
    arguments, place = COMMANDS[name]
    monkeypatch.setattr(place, raising(bug))
    with pytest.raises(type(bug)) as caught:
        cli.main([name, *filled_in(arguments, trained, tmp_path)])
    assert caught.value is bug or caught.value.__cause__ is bug
    assert caught.value.__notes__ == [REPORT]
    assert "error: " not in capfd.readouterr().err
    del bug.__notes__


def test_the_command_of_cards_has_them_too(trained, monkeypatch):
    monkeypatch.setattr("hf_dbp.hub.model_card.summary", raising(bug := KeyError("task")))
    with pytest.raises(KeyError) as caught:
        model_card.main([str(trained / "run"), "--output_dir", str(trained / "card")])
    assert caught.value is bug and bug.__notes__ == [REPORT]


def test_a_bug_in_a_process_shows_traceback_and_note_and_fails_otherwise_than_a_mistake():
    code = "from hf_dbp import cli, inspection; cli.COMMANDS['inspect'] = 'hf_dbp.gone'; cli.main(['inspect', '.'])"
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and "No module named 'hf_dbp.gone'" in ended.stderr
    assert ended.stderr.rstrip().endswith(REPORT)


KINDS = [
    kind
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, Warning | UnicodeError)
    and not kind.__name__.endswith("Group")
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_kind_of_exception_is_taken_for_a_mistake_of_the_users(kind):
    bug = kind("install the pipes, pip install luck")  # whatever it says
    with pytest.raises(kind) as caught:
        command(raising_here(bug))([])
    assert caught.value is bug and bug.__notes__ == [REPORT]


def raising_here(bug):
    """A main whose innermost frame is in the package."""
    code = compile("def main(arguments):\n    raise bug", str(Path(cli.__file__)), "exec")
    names = {"bug": bug}
    exec(code, names)
    return names["main"]


def ends_with_one_line(error, capsys, arguments=()):
    with pytest.raises(SystemExit) as stop:
        command(raising(error))(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_mistake_is_one_line(capsys):
    assert ends_with_one_line(UserError("--eta lies in [0, 1)"), capsys) == "error: --eta lies in [0, 1)\n"


@pytest.mark.parametrize("number", REMEDIES, ids=lambda number: errno.errorcode[number])
def test_files_that_cannot_be_are_one_line_with_what_to_do(number, capsys, tmp_path):
    error = OSError(number, os.strerror(number), str(tmp_path / "out"))
    line = ends_with_one_line(error, capsys)
    assert line == f"error: {tmp_path / 'out'}: {os.strerror(number).lower()}; {REMEDIES[number]}\n"


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF, errno.EPIPE])
def test_other_errors_of_files_are_not(number):
    with pytest.raises(OSError) as caught:
        command(raising(OSError(number, os.strerror(number), "out")))([])
    assert caught.value.__notes__ == [REPORT]


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        (
            "import wandb_that_nobody_has",
            "error: these flags need the package wandb_that_nobody_has: pip install wandb",
        ),
        (
            "raise RuntimeError('MLflowCallback requires mlflow to be installed. Run `pip install mlflow`.')",
            "error: these flags need a package that is not installed: MLflowCallback requires mlflow",
        ),
        (
            "raise ImportError('You need to install `bitsandbytes`: `pip install -U bitsandbytes`')",
            "error: these flags need a package that is not installed: You need to install `bitsandbytes`",
        ),
    ],
)
def test_a_package_that_a_library_misses_is_one_line(statement, line, capsys):
    library = {}
    exec(compile(f"def main(arguments):\n    {statement}", "site-packages/transformers/there.py", "exec"), library)
    with pytest.raises(SystemExit) as stop:
        command(library["main"])([])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
@pytest.mark.parametrize("logger", ["wandb", "mlflow", "tensorboard"])
def test_loggers_that_are_not_installed_are_named(name, logger, trained, tmp_path, capfd, monkeypatch):
    found = importlib.util.find_spec
    gone = (logger, f"{logger}X")  # tensorboard has another name
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *rest: None if one in gone else found(one, *rest))
    given = filled_in(COMMANDS[name][0], trained, tmp_path / "out")
    given[given.index("--report_to") + 1] = logger
    ends_with_one_line_of(capfd, [name, *given], f"--report_to {logger} needs", f"pip install {logger}")


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    ("optimizer", "package"),
    [
        ("adamw_bnb_8bit", "bitsandbytes"), ("schedule_free_adamw", "schedulefree"), ("grokadamw", "grokadamw"),
        ("adamw_anyprecision", "torchdistx"), ("lomo", "lomo_optim"),
        ("stable_adamw", "optimi"), ("adamw_torch_4bit", "torchao"), ("galore_adamw", "galore_torch"),
    ],
)  # fmt: skip
def test_optimizers_that_are_not_installed_are_named(name, optimizer, package, trained, tmp_path, capfd, monkeypatch):
    if package == "schedulefree":
        monkeypatch.setattr("transformers.trainer_optimizer.is_schedulefree_available", lambda *_: False)
    elif importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    given = filled_in(COMMANDS[name][0], trained, tmp_path / "out")
    ends_with_one_line_of(capfd, [name, *given, "--optim", optimizer], f"--optim {optimizer} cannot be used: ")


@pytest.mark.parametrize(
    ("name", "arguments", "package"),
    [("pretrain", ["--optimizer", "soap"], "pytorch_optimizer"), ("export", [], "onnx")],
)
def test_our_optional_packages_are_named(name, arguments, package, trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    given = filled_in(COMMANDS[name][0], trained, tmp_path / "out")
    ends_with_one_line_of(capfd, [name, *given, *arguments], "pip install")


def test_a_logger_that_nobody_knows_is_named(trained, tmp_path, capfd):
    given = filled_in(FINETUNE, trained, tmp_path / "out")
    given[given.index("--report_to") + 1] = "wandbb"
    ends_with_one_line_of(capfd, ["finetune", *given], "--report_to wandbb: choose from ")


def ends_with_one_line_of(capfd, arguments, *expected):
    """A command ends with one line that holds these texts, and nothing of a traceback before it."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and "This is a bug in hf_dbp" not in said
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(text in line for text in expected), line


# ---- places that cannot be written to ----


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """A folder that cannot be written to: read-only for the superuser, without permission for others."""
    folder = tmp_path_factory.mktemp("read_only")
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("the superuser may write everywhere, and nothing can be mounted: read-only folders are not tested")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("place", ["a file", "below a file", "read-only"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "demo")) for name in COMMANDS])
def test_an_output_that_cannot_be_written_is_one_line(name, place, trained, tmp_path, capfd, request):
    (tmp_path / "taken").write_text("a file")
    out = {"a file": tmp_path / "taken", "below a file": tmp_path / "taken" / "out"}.get(place)
    out = request.getfixturevalue("read_only") / "out" if out is None else out
    named = out.parent if place == "below a file" else out
    ends_with_one_line_of(capfd, [name, *filled_in(COMMANDS[name][0], trained, out)], str(named))
    assert (tmp_path / "taken").read_text() == "a file"


READERS = {
    "pretrain": ["--train_dir", "IMAGES", *RUN[6:], *MAE],
    "finetune": ["--train_dir", "IMAGES", "--train_mask_dir", "MASKS", "--num_labels", "2", *RUN[6:], *FINETUNE[-8:-2]],
    "retrieve": COMMANDS["retrieve"][0][:-2],
    "probe": COMMANDS["probe"][0][:-2],
    "embed": COMMANDS["embed"][0][:-2],
    "export": COMMANDS["export"][0][:-2],
}


@pytest.mark.parametrize("name", READERS)
def test_a_cache_that_cannot_be_written_is_one_line(name, trained, tmp_path, capfd, monkeypatch, read_only):
    """Images of a folder go through the cache of `datasets`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", read_only)
    output = {"probe": ["--output_file", "OUT/probe.json"], "embed": ["--output_file", "OUT/table.parquet"]}
    arguments = [*READERS[name], *output.get(name, ["--output_dir", "OUT"])]
    ends_with_one_line_of(capfd, [name, *filled_in(arguments, trained, tmp_path / "out")], str(read_only))


@pytest.mark.parametrize("arguments", [["--log_level", "debug"], ["--eta", "2", "--log_level=debug"]])
def test_log_level_debug_shows_the_traceback_of_a_mistake(arguments, capsys):
    shown = ends_with_one_line(UserError("--eta lies in [0, 1)"), capsys, arguments)
    assert shown.startswith("Traceback") and shown.endswith("\nerror: --eta lies in [0, 1)\n")
    quiet = ends_with_one_line(UserError("--eta lies in [0, 1)"), capsys, ["--log_level", "info"])
    assert "Traceback" not in quiet


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("", False), ("0", False)])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_environment_shows_it_for_every_command(name, value, shown, monkeypatch, capsys):
    monkeypatch.setenv("HF_DBP_DEBUG", value)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--output_dir", "nowhere", "--runs", "nowhere/run", "--plan", "nowhere.yaml", "nowhere/run"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error.splitlines()[-1]
    if "usage:" not in error:  # argparse's own, of a flag that is not there
        assert ("Traceback" in error) == shown


def test_flags_that_do_not_fit_together_are_one_line_and_a_bug_in_their_check_is_not(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="these flags do not work"):
        PretrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=2, save_strategy="epoch")
    monkeypatch.setattr("hf_dbp.training.arguments.feed_fast", raising(AttributeError("no such field")))
    with pytest.raises(AttributeError):
        cli.main(["pretrain", "--output_dir", str(tmp_path), "--use_cpu", "--do_train"])


def interrupted(arguments=()):
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_command_in_one_line_and_stays_an_interrupt_from_python(monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS["embed"]), "main", command(interrupted))
    monkeypatch.setattr(sys, "argv", ["hf-dbp", "embed", "vit", "images"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["embed", "vit", "images"])


INTERRUPTED_IMPORT = """
import signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
sys.argv = ["hf-dbp", "pretrain", "images"]
import hf_dbp.cli
hf_dbp.cli.main()
"""


def test_ctrl_c_while_a_command_imports_its_libraries_shows_no_traceback():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], check=False, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "stopped by SIGINT\n"

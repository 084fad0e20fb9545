"""The example scripts, as their docstrings write them, on tiny data; and the comparison tool over one of them."""

import json
import re
import shlex
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import BertForMaskedLM, VideoMAEForPreTraining

from hf_dbp.comparison import runner
from hf_dbp.comparison.plans import read_plan
from hf_dbp.probing import SAVING

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHORT = (
    "--max_steps 2 --eval_strategy steps --eval_steps 1 --logging_steps 1 --save_strategy no --use_cpu true "
    "--report_to none --disable_tqdm true --per_device_train_batch_size 4 --hidden_size 32 --num_layers 1 "
    "--learning_rate 1e-3 --update_interval 1"
)


def load(path):
    spec = util.spec_from_file_location(path.stem, path)
    module = util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def commands(path):
    """What follows the script's name in the commands of its docstring."""
    return [shlex.split(line) for line in re.findall(rf"python examples/{path.name} (.*)", path.read_text())]


def frames(folder):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(45):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / f"a_{i:03}.png")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_run_as_written(path, tmp_path, monkeypatch):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 120
    monkeypatch.chdir(tmp_path)
    frames(tmp_path / "CAMVID" / "images")
    stock = BertForMaskedLM if path.stem == "masked_language_model" else VideoMAEForPreTraining
    for written in commands(path):
        small = "--length 16 --vocabulary 300" if stock is BertForMaskedLM else "--image_size 32"
        text = tmp_path / "text"
        if stock is BertForMaskedLM:
            text.mkdir(exist_ok=True)
            for i in range(12):
                (text / f"{i}.txt").write_text("A few words of one paragraph.\n\nAnd some more, of another one.\n" * 3)
            small += f" --train_dir {text}"
        load(path).main([*written, *SHORT.split(), *small.split()])
        folder = Path(written[written.index("--output_dir") + 1])
        record = json.loads((folder / "run.json").read_text())
        assert record["results"]["finished"] and [row["step"] for row in record["rows"]] == [1, 2]
        assert record["method"] == ("dbp" if "dbp" in written else "bp")
        assert ("mean_squared_correlation" in record["rows"][-1]) == ("dbp" in written)
        _, info = stock.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_volumes_are_read_as_sequences_of_slices(tmp_path):
    import nibabel

    volume = np.random.default_rng(0).normal(size=(20, 24, 30)).astype(np.float32)
    np.save(tmp_path / "a.npy", volume)
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(volume, 0, -1), np.eye(4)), tmp_path / "b.nii.gz")
    videos = load(ROOT / "examples" / "masked_video.py").read_videos(str(tmp_path), 16)
    assert [tuple(video.shape) for video in videos] == [(20, 3, 16, 16)] * 2
    np.testing.assert_allclose(videos[0], videos[1], atol=1e-5)
    assert videos[0].min() >= 0.0 and videos[0].max() <= 1.0


SCRIPT = """
import argparse
from hf_dbp.records import RunRecord
parser = argparse.ArgumentParser()
for name in ("method", "seed", "output_dir"):
    parser.add_argument("--" + name)
args = parser.parse_args()
record = RunRecord("pretraining", args.method, "adamw", int(args.seed), results={"finished": True})
for step in (1, 2):
    loss = 1.0 / step - 0.1 * (args.method == "dbp") + 0.01 * int(args.seed)
    record.add_row({"step": step, "epoch": float(step), "eval_loss": loss, "train_seconds": float(step)})
record.write(args.output_dir + "/run.json")
"""


@pytest.mark.slow
def test_the_comparison_runs_any_script_that_writes_a_record(tmp_path):
    script, plan = tmp_path / "script.py", tmp_path / "plan.yaml"
    script.write_text(SCRIPT)
    plan.write_text(
        f"script: {script}\naxes: {{method: {{bp: {{method: bp}}, dbp: {{method: dbp}}}}}}\nseeds: [0, 1]\n"
    )
    runner.main(["--plan", str(plan), "--output_dir", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert report["comparisons"][0]["other"] == "dbp"
    assert "0.4" in (tmp_path / "out" / "report" / "README.md").read_text()
    plan.write_text(plan.read_text().replace("script.py", "none.py"))
    with pytest.raises(SystemExit):
        runner.main(["--plan", str(plan), "--output_dir", str(tmp_path / "other")])


OTHER_REPORTS = (
    "yardstick",
    "yardstick_tiny",
    "yardstick_long",
    "yardstick_wire_bonding",
    "modalities/text",
    "modalities/audio",
    "modalities/video",
)


def test_the_page_on_when_it_pays_quotes_the_reports():
    page = (ROOT / "docs" / "when.md").read_text(encoding="utf-8")
    results = ROOT / "docs" / "results"
    report = (results / "methods" / "README.md").read_text(encoding="utf-8")
    others = [(results / name / "README.md").read_text(encoding="utf-8") for name in OTHER_REPORTS]
    reports = "".join([report, *others])
    quoted = re.findall(r"[+-][\d.]+ % \[[^\]]+\]", " ".join(page.split()))
    assert len(quoted) == 33 and not [figure for figure in quoted if figure not in reports]
    measured = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:batch|width) \d+)[^|]*\| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 6
    for name, every, cheap in rows:
        cells = next(line for line in measured.splitlines() if line.startswith(f"| {name} ")).split("|")
        assert (cells[4].strip(), cells[6].strip()) == (every, cheap), name
    assert f"{100 * SAVING:.1f} %" in page and f"+{100 * SAVING:.1f} %" in report


def test_the_plan_on_that_page_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "when.md").read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    (tmp_path / "plan.yaml").write_text(text)
    plan = read_plan(str(tmp_path / "plan.yaml"))
    plan.check()
    assert len(plan.search_runs()) == 8

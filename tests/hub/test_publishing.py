"""Models go to a Hub over HTTP and come back the same; what can go wrong says so and loses nothing; no token leaks."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hub_models import TOKEN, Ended, ModelHub, run_commands
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from loopback import hub_environment
from test_pretraining import flags
from transformers import TrainingArguments, ViTModel

from hf_dbp.hub.publishing import Destination, claim_push

sys.path.insert(0, str(Path(__file__).parents[1] / "downstream" / "classification"))

from class_images import FLAGS as CLASSIFY
from class_images import class_folders
from object_images import FLAGS as DETECT
from object_images import object_folder

pytestmark = pytest.mark.slow  # its fixture trains, fuses and pushes

CARD_FILES = {"README.md", "config.json", "preprocessor_config.json", "curves.png"}
FUSED = CARD_FILES | {"model.safetensors", "reconstruction.png", "run.json"}
UNFUSED = CARD_FILES | {"model.unfused.safetensors", "reconstruction.png", "run.json"}
SEGMENTER = CARD_FILES | {"model.safetensors", "predictions.png", "worst.png", "eval.json"}
CLASSIFIER = CARD_FILES | {"model.safetensors", "confusion.png", "calibration.png", "mistakes.png", "eval.json"}
DETECTOR = CARD_FILES | {"model.safetensors", "predictions.png", "eval.json"}
SEGMENTATION = {
    "dataset_name": "wire_bonding", "built_in_size": 48, "max_train_samples": 8, "max_eval_samples": 2,
    "crop_size": 32, "head_size": 8, "auxiliary_head_size": 8, "num_train_epochs": 1,
    "per_device_train_batch_size": 4, "eval_strategy": "epoch", "save_strategy": "epoch", "report_to": "none",
    "use_cpu": True, "do_train": True, "do_eval": True, "disable_tqdm": True,
}  # fmt: skip


@dataclass
class Pushed:
    """What the fixture's process did, where, and what the Hub then held."""

    folder: Path
    hub: ModelHub
    ended: dict[str, Ended]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """One user's process that trains, pushes and fails in every way, with a Hub that stays up for the tests."""
    folder = tmp_path_factory.mktemp("user")
    run, fused = folder / "run", folder / "run" / "fused"
    layers = "num_hidden_layers=4,hidden_size=32,num_attention_heads=2,intermediate_size=64"
    train = flags(run, config_overrides=layers, num_train_epochs=1, push_to_hub=True, hub_model_id="me/vit",
                  push_unfused=True, hub_token=TOKEN, token=TOKEN)  # fmt: skip
    segment = [f"--{key}={value}" for key, value in SEGMENTATION.items()]
    segment += [f"--model_name_or_path={fused}", f"--output_dir={folder / 'segmenter'}"]
    segment += ["--push_to_hub", "--hub_model_id=me/segmenter", f"--hub_token={TOKEN}", f"--token={TOKEN}"]

    images = class_folders(folder / "images", channels=2)
    classify = [images, f"--model_name_or_path={fused}", *CLASSIFY[6:], f"--output_dir={folder / 'classifier'}"]
    classify += ["--push_to_hub", "--hub_model_id=me/classifier", f"--hub_token={TOKEN}", f"--token={TOKEN}"]

    found = object_folder(folder / "objects", channels=2)
    detect = [found / "images", found / "labels.json", f"--model_name_or_path={fused}", *DETECT[4:]]
    detect += [f"--hub_token={TOKEN}", f"--token={TOKEN}", "--push_to_hub"]
    boxes, masks = (["--hub_model_id", f"me/{name}", "--output_dir", folder / name] for name in ("boxes", "instances"))

    def fuse(name, *more):
        return [run, "--output_dir", folder / name, "--num_images", "2", "--push_to_hub", "--hub_model_id", name, *more]

    commands = {
        "train": ("hf_dbp.pretraining", train, ""),
        "unfused": ("hub.unfused_user", ["me/vit-unfused", folder / "unfused.pt"], ""),
        "segment": ("hf_dbp.downstream.segmentation.finetuning", segment, ""),
        "classify": ("hf_dbp.downstream.classification.finetuning", classify, ""),
        "boxes": ("hf_dbp.downstream.detection.finetuning", [*detect, *boxes], ""),
        "instances": ("hf_dbp.downstream.detection.finetuning", [*detect, *masks, "--instances"], ""),
        "private": ("hf_dbp.fusing", fuse("vit-2", "--private"), TOKEN),
        "same again": ("hf_dbp.fusing", fuse("vit-2"), TOKEN),
        "no token": ("hf_dbp.fusing", fuse("me/never"), ""),
        "bad token": ("hf_dbp.fusing", fuse("me/never"), TOKEN[:-1]),
        "not mine": ("hf_dbp.fusing", fuse("you/never"), TOKEN),
        "commit cut": ("hf_dbp.fusing", fuse("me/cut"), TOKEN),
        "commit again": ("hf_dbp.fusing", fuse("me/cut"), TOKEN),
        "large cut": ("hf_dbp.fusing", fuse("me/large"), TOKEN),
        "may not": ("hf_dbp.pretraining", flags(folder / "no", push_to_hub=True, hub_model_id="you/x"), TOKEN),
    }
    with ModelHub() as hub:
        hub.cut = {("commit", "me/cut"), ("large", "me/large")}
        ended = run_commands(list(commands.values()), hub_environment(hub.url, folder / "home"))
        yield Pushed(folder, hub, dict(zip(commands, ended, strict=True)))


@pytest.fixture(scope="module")
def pulled(pushed):
    """What a user without hf_dbp gets from the Hub."""
    output = pushed.folder / "stock.pt"
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("stock_user.py"), "me/vit", output],
        env=hub_environment(pushed.hub.url, pushed.folder / "stock"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return torch.load(output)


def held(pushed, repo_id):
    return pushed.hub.repositories[repo_id].files


def test_training_pushes_the_fused_model_and_what_belongs_to_it(pushed):
    assert pushed.ended["train"].status == 0, pushed.ended["train"].output
    assert held(pushed, "me/vit").keys() == FUSED
    assert len(pushed.hub.repositories["me/vit"].commits) == 2  # the Trainer's own pushes would be more
    for name, content in held(pushed, "me/vit").items():
        assert content == (pushed.folder / "run" / "fused" / name).read_bytes()
    assert "pushed: " in pushed.ended["train"].output


def test_the_pulled_model_gives_the_local_features(pushed, pulled):
    local = ViTModel.from_pretrained(pushed.folder / "run" / "fused", add_pooling_layer=False).eval()
    with torch.no_grad():
        features = local(torch.linspace(-2, 2, 2 * 2 * 32 * 32).view(2, 2, 32, 32)).last_hidden_state
    assert pulled["class"] == "ViTModel"
    assert torch.equal(pulled["features"], features)


def test_a_fused_checkpoint_fine_tunes_in_stock_trainer_code(pulled):
    assert sum(pulled["losses"][-3:]) < 0.5 * sum(pulled["losses"][:3])


def test_unfused_weights_go_to_a_repository_of_their_own_and_fuse_in_one_call(pushed):
    assert held(pushed, "me/vit-unfused").keys() == UNFUSED
    assert "load_fused_vit(" in held(pushed, "me/vit-unfused")["README.md"].decode()
    assert pushed.ended["unfused"].status == 0, pushed.ended["unfused"].output
    local = ViTModel.from_pretrained(pushed.folder / "run" / "fused", add_pooling_layer=False).state_dict()
    loaded = torch.load(pushed.folder / "unfused.pt")
    assert local.keys() == loaded.keys()
    assert all(torch.equal(local[key], loaded[key]) for key in local)


def test_segmentation_pushes_its_model(pushed):
    assert pushed.ended["segment"].status == 0, pushed.ended["segment"].output
    assert held(pushed, "me/segmenter").keys() == SEGMENTER


def test_classification_pushes_its_model(pushed):
    assert pushed.ended["classify"].status == 0, pushed.ended["classify"].output
    assert held(pushed, "me/classifier").keys() == CLASSIFIER


@pytest.mark.parametrize("name", ["boxes", "instances"])
def test_detection_pushes_its_model(pushed, name):
    assert pushed.ended[name].status == 0, pushed.ended[name].output
    assert held(pushed, f"me/{name}").keys() == DETECTOR


@pytest.mark.parametrize(
    ("repo_id", "record"),
    [
        ("me/vit", "run.json"),
        *((f"me/{name}", "eval.json") for name in ("segmenter", "classifier", "boxes", "instances")),
    ],
)
def test_cards_pass_validation_and_read_back(pushed, repo_id, record):
    assert pushed.hub.requests.count(("POST", "/api/validate-yaml")) >= len(pushed.hub.repositories)
    card = ModelCard(held(pushed, repo_id)["README.md"].decode())
    measured = json.loads(held(pushed, repo_id)[record])
    values = [result.metric_value for result in card.data.eval_results]  # type: ignore[attr-defined]
    task = next(name for name in ("mean_iou", "map", "accuracy", "best") if name in measured)
    names = ("mean_iou", "mean_accuracy", "overall_accuracy") if task == "mean_iou" else (task,)
    expected = [measured["best"]["eval_loss"]] if "best" in measured else [measured[name] for name in names]
    assert values == expected
    assert card.data.model_name == repo_id.partition("/")[2]  # type: ignore[attr-defined]


def test_the_pulled_card_is_the_pushed_one(pushed, pulled):
    assert pulled["card"] == ModelCard(held(pushed, "me/vit")["README.md"].decode()).data.to_dict()


def test_private_names_of_ones_own_and_repetition(pushed):
    assert pushed.ended["private"].status == 0, pushed.ended["private"].output
    assert pushed.hub.repositories["me/vit-2"].private
    assert not pushed.hub.repositories["me/vit"].private
    assert pushed.ended["same again"].status == 0, pushed.ended["same again"].output
    assert len(pushed.hub.repositories["me/vit-2"].commits) == 2  # nothing new, no commit


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "error: no Hub token, which pushing to me/never needs: log in with `hf auth login`, or"),
        ("bad token", "error: the Hub does not accept the token for me/never (401): log in with"),
        ("not mine", "error: this account may not write to you/never (403): choose a name under your own account"),
        ("may not", "error: this account may not write to you/x (403)"),
    ],
)  # fmt: skip
def test_refusals_come_first_and_in_one_line(pushed, case, message):
    assert pushed.ended[case].status == 2
    assert pushed.ended[case].error.startswith(message)
    assert not {"me/never", "you/never", "you/x"} & pushed.hub.repositories.keys()
    assert not (pushed.folder / "no").exists()
    assert not (pushed.folder / "me" / "never").exists()


def test_an_upload_that_is_cut_off_leaves_all_or_nothing_and_completes_when_repeated(pushed):
    ended = pushed.ended["commit cut"]
    folder = pushed.folder / "me" / "cut"
    assert ended.status == 2
    assert ended.error.startswith(f"error: the connection to the Hub at {pushed.hub.url} failed or broke")
    assert f"; nothing is lost; push again with: hf upload me/cut {folder} . --include README.md " in ended.error
    assert pushed.ended["commit again"].status == 0, pushed.ended["commit again"].output
    assert len(pushed.hub.repositories["me/cut"].commits) == 2
    assert held(pushed, "me/cut") == {name: (folder / name).read_bytes() for name in FUSED}


@pytest.mark.parametrize(
    ("options", "ending"), [({}, []), ({"private": True, "revision": "dev"}, ["--revision", "dev", "--private"])]
)
def test_the_command_that_repeats_a_push_takes_the_same_files(tmp_path, monkeypatch, options, ending):
    """Even of a run's whole folder, with its checkpoints and what else lies there."""
    for name in (*UNFUSED, "optimizer.pt", ".env", "checkpoint-3/model.safetensors", "fused/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")

    def cut_off(*args, **kwargs):
        raise OSError("cut off")

    monkeypatch.setattr(HfApi, "create_commit", cut_off)
    with pytest.raises(ValueError, match="nothing is lost; push again with: ") as failed:
        Destination("me/vit-unfused", token="t", **options).push(tmp_path)
    command = shlex.split(str(failed.value).partition("push again with: ")[2])
    assert command[:5] == ["hf", "upload", "me/vit-unfused", str(tmp_path), "."]
    given = list(pairwise(command))
    include, exclude = ([value for flag, value in given if flag == wanted] for wanted in ("--include", "--exclude"))
    assert command[command.index("*/*") + 1 :] == ending
    there = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()]
    assert {*filter_repo_objects(there, allow_patterns=include, ignore_patterns=exclude)} == UNFUSED


def test_a_large_file_that_is_cut_off_is_sent_again(pushed):
    assert not pushed.hub.cut
    assert pushed.ended["large cut"].status == 0, pushed.ended["large cut"].output
    assert held(pushed, "me/large").keys() == FUSED


def test_no_token_in_any_file_log_or_card(pushed):
    places = [file for file in pushed.folder.rglob("*") if file.is_file()]
    assert {"run.json", "trainer_state.json", "eval.json", "README.md"} <= {file.name for file in places}
    secret = TOKEN.encode()
    assert [file for file in places if secret in file.read_bytes()] == []
    for repository in pushed.hub.repositories.values():
        assert [name for name, content in repository.files.items() if secret in content] == []
    assert [case for case, ended in pushed.ended.items() if TOKEN in ended.output] == []


def test_no_network(tmp_path):
    with ModelHub() as hub:
        closed = hub.url
    fuse = [tmp_path, "--output_dir", tmp_path / "out", "--push_to_hub"]
    ended = run_commands([("hf_dbp.fusing", fuse, TOKEN)], hub_environment(closed, tmp_path))[0]
    assert ended.status == 2
    assert ended.error.startswith(f"error: the connection to the Hub at {closed} failed")


def test_a_file_that_holds_a_token_is_not_pushed(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"note": TOKEN}}))
    with pytest.raises(ValueError, match=r"run\.json holds a Hub token"):
        Destination("me/vit", token="another").push(tmp_path)
    assert TOKEN not in repr(Destination("me/vit", token=TOKEN))


def test_the_trainer_does_not_push_by_itself(tmp_path):
    assert claim_push(TrainingArguments(str(tmp_path), report_to="none")) is None
    args = TrainingArguments(str(tmp_path), push_to_hub=True, hub_strategy="all_checkpoints", report_to="none")
    with pytest.raises(ValueError, match="--hub_strategy all_checkpoints: checkpoints are not pushed"):
        claim_push(args)

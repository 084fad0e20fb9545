"""Which images to label: coverage of what there is."""

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_dbp.cli import main
from hf_dbp.downstream.embedding import Embeddings, read_embeddings
from hf_dbp.downstream.selection import METHODS, coverage, select_images


def table_of(features, duplicate_of=None):
    names = [f"image {index}" for index in range(len(features))]
    duplicate_of = duplicate_of or [None] * len(features)
    return Embeddings(np.arange(len(features)), names, features, duplicate_of, np.zeros(len(features), np.float32), {})


def heaps(sizes, spread=0.05):
    """Heaps of images around well separated centres, and the heap of each."""
    centres = torch.eye(len(sizes), 8) * 3
    heap = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    return centres[heap] + torch.randn(len(heap), 8) * spread, heap


@pytest.mark.parametrize("method", ["typical", "k_centre"])
def test_every_heap_is_chosen_from_however_small(method):
    features, heap = heaps([200, 40, 10, 5])
    for seed in range(5):
        chosen = select_images(table_of(features), 4, method, seed=seed)
        assert sorted(heap[chosen].tolist()) == [0, 1, 2, 3]
    assert (
        sum(len(set(heap[select_images(table_of(features), 4, "random", seed=s)].tolist())) == 4 for s in range(5)) < 5
    )


def test_typical_images_lie_inside_and_come_largest_heap_first():
    features, heap = heaps([50, 30, 20])
    chosen = select_images(table_of(features), 3, "typical")
    assert heap[chosen].tolist() == [0, 1, 2]
    for number, row in enumerate(chosen):
        distance = (features[heap == number] - features[heap == number].mean(dim=0)).norm(dim=1)
        assert (features[row] - features[heap == number].mean(dim=0)).norm() <= distance.median()


@pytest.mark.parametrize("method", ["typical", "k_centre"])
def test_what_is_labelled_is_not_asked_for_again(method):
    features, heap = heaps([20, 20, 20, 20])
    labelled = ["image 3", "image 25"]  # of the first two heaps
    chosen = select_images(table_of(features), 2, method, labelled)
    assert sorted(heap[chosen].tolist()) == [2, 3]


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(list(METHODS)), count=st.integers(2, 40), copies=st.integers(0, 20),
    seed=st.integers(0, 999), data=st.data(),
)  # fmt: skip
def test_as_many_as_asked_for_all_different_none_a_copy_none_labelled(method, count, copies, seed, data):
    features = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    features = torch.cat([features, features[:1].expand(copies, -1)])
    table = table_of(features, [None] * count + ["image 0"] * copies)
    labelled = data.draw(st.sets(st.sampled_from(table.names[:count]), max_size=count - 1))
    budget = data.draw(st.integers(1, count - len(labelled)))
    chosen = select_images(table, budget, method, sorted(labelled), seed)
    assert len(set(chosen)) == len(chosen) == budget
    assert max(chosen) < count and not {table.names[row] for row in chosen} & labelled
    assert chosen == select_images(table, budget, method, sorted(labelled), seed)
    similarity, stands_for = coverage(table, chosen)
    assert stands_for.sum() == len(features) and -1 <= similarity <= 1 + 1e-6


def test_equal_features_are_chosen_from_too():
    """There are fewer clusters than images to choose: the rest is filled up."""
    assert len(set(select_images(table_of(torch.ones(9, 3)), 5, "typical"))) == 5


@pytest.mark.parametrize(
    ("budget", "labelled", "message"),
    [
        (10, [], "9 images are left to choose from, without near-copies \\(1\\) and labelled ones \\(0\\)"),
        (0, [], "--budget 0"),
        (1, ["picture"], "1 labelled images are not in the table, e.g. 'picture'; it has 'image 0'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(budget, labelled, message):
    table = table_of(torch.randn(10, 3), [None] * 9 + ["image 0"])
    with pytest.raises(ValueError, match=message):
        select_images(table, budget, "typical", labelled)


def listed(folder):
    return list(csv.DictReader((folder / "selection.csv").read_text().splitlines()))


def test_from_a_folder_to_a_list_and_a_contact_sheet(real_pictures, tmp_path, capsys, caplog):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((40, 40)).save(
            tmp_path / "images" / f"{index}.png"
        )
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    table = str(tmp_path / "table.parquet")
    main(["embed", str(tmp_path / "vit"), str(tmp_path / "images"), "-o", table])
    main(["select", table, "--budget", "4", "--output_dir", str(tmp_path / "out")])
    assert "20 random choices" in capsys.readouterr().out
    rows = listed(tmp_path / "out")
    known = read_embeddings(table)
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert all(known.names[int(row["row"])] == row["name"] for row in rows)
    assert sum(int(row["stands_for"]) for row in rows) == 12
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    (tmp_path / "labelled.txt").write_text("\n".join(row["name"] for row in rows))
    flags = ["--labelled", str(tmp_path / "labelled.txt"), "--output_dir", str(tmp_path / "more")]
    main(["select", table, "--budget", "8", *flags])
    more = {row["name"] for row in listed(tmp_path / "more")}
    assert more == set(known.names) - {row["name"] for row in rows}
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    main(["select", table, "--budget", "4", "--output_dir", str(tmp_path / "blind")])
    assert "no contact sheet" in caplog.text
    assert (tmp_path / "blind" / "selection.csv").read_text() == (tmp_path / "out" / "selection.csv").read_text()

"""Features as a table: written at once, resumed, compared; every way gives the figures of the plain one."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_dbp import locking
from hf_dbp.cli import main
from hf_dbp.data.images import ImageSource
from hf_dbp.data.one_split import open_images
from hf_dbp.downstream import embedding, partial
from hf_dbp.downstream.embedding import embed_images, nearest_of_queries, read_embeddings
from hf_dbp.downstream.features import load_encoder
from hf_dbp.downstream.neighbours import centred, near_duplicates, nearest, outlier_scores
from hf_dbp.downstream.probe import extract_features


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of several sizes, one of them twice, one damaged; and a ViT."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "lot").mkdir(parents=True)
    for index in range(12):
        coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        size = (40 + index, 60) if index % 2 else (64, 48)
        Image.fromarray(coarse).resize(size).save(tmp_path / "images" / "lot" / f"{index:02}.png")
    (tmp_path / "images" / "z_copy.png").write_bytes((tmp_path / "images" / "lot" / "03.png").read_bytes())
    (tmp_path / "images" / "damaged.png").write_bytes(b"no picture")
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.3, 0.3, 0.3]}'
    )
    return tmp_path


def opened(folder):
    images = open_images(ImageSource(train_dir=str(folder / "images")))
    return images, load_encoder(str(folder / "vit"), images)


def embed(folder, *flags):
    main(["embed", str(folder / "vit"), str(folder / "images"), "-o", str(folder / "table.parquet"), *flags])
    return read_embeddings(folder / "table.parquet")


def test_the_table_holds_the_probes_features_and_what_was_found(folder, capsys):
    table = embed(folder, "--batch_size", "5", "--patch_features", str(folder / "patches.npy"))
    images, encoder = opened(folder)
    features, known = extract_features(encoder.vit, encoder.squares(images), "mean", 4)
    assert torch.equal(
        known, torch.tensor([name != str(folder / "images" / "damaged.png") for name in all_names(folder)])
    )
    torch.testing.assert_close(table.features_ND, features, rtol=1e-5, atol=1e-5)
    assert [Path(name).name for name in table.names] == ["00.png", *(f"{i:02}.png" for i in range(1, 12)), "z_copy.png"]
    copies = {Path(a).name: Path(b).name for a, b in zip(table.names, table.duplicate_of, strict=True) if b}
    assert copies == {"z_copy.png": "03.png"}
    patches = np.load(folder / "patches.npy", mmap_mode="r")
    assert patches.shape == (14, 16, 24)
    np.testing.assert_allclose(patches[table.rows].astype(np.float32).mean(axis=1), table.features_ND, atol=2e-3)
    whole = pq.read_table(folder / "table.parquet").to_pydict()
    errors = {Path(name).name: error for name, error in zip(whole["name"], whole["error"], strict=True) if error}
    assert errors.keys() == {"damaged.png"} and whole["feature"].count(None) == 1
    out = capsys.readouterr().out
    assert "images/s" in out and "1 near-duplicates" in out and "unreadable  1" in out
    assert not (folder / "table.parquet.partial").exists()


def all_names(folder):
    return pq.read_table(folder / "table.parquet")["name"].to_pylist()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_stopped_run_resumes_and_ends_as_one_that_was_not(folder, monkeypatch, pooling):
    whole = embed(folder, "--pooling", pooling)
    (folder / "table.parquet").unlink()
    monkeypatch.setattr(partial, "FLUSHED", 0.0)
    images, encoder = opened(folder)
    seen, real = [], embedding.token_batches

    def stopping(*args):
        for number, batch in enumerate(real(*args)):
            if number == 2 and not seen:
                seen.append(number)
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(embedding, "token_batches", stopping)
    how = {"pooling": pooling, "batch_size": 3, "patch_file": folder / "patches.npy"}
    with pytest.raises(KeyboardInterrupt):
        embed_images(encoder, images, folder / "table.parquet", **how)
    assert not (folder / "table.parquet").exists()
    images, encoder = opened(folder)
    record = embed_images(encoder, images, folder / "table.parquet", **how)
    assert (record["images"], record["embedded_now"], record["unreadable"]) == (14, 14 - 6, 1)
    resumed = read_embeddings(folder / "table.parquet")
    torch.testing.assert_close(resumed.features_ND, whole.features_ND, rtol=1e-5, atol=1e-5)
    assert resumed.names == whole.names and resumed.duplicate_of == whole.duplicate_of
    patches = np.load(folder / "patches.npy")
    assert (np.abs(patches[resumed.rows]).sum(axis=(1, 2)) > 0).all()


def test_what_is_there_is_not_embedded_again_unless_it_is_other_work(folder, caplog):
    assert embed(folder).record["embedded_now"] == 14
    images, encoder = opened(folder)
    again = embed_images(encoder, images, folder / "table.parquet")
    assert again["embedded_now"] == 0
    compared = embed_images(encoder, images, folder / "table.parquet", threshold=-1.0)
    assert (compared["embedded_now"], compared["near_duplicates"]) == (0, 12)
    table = read_embeddings(folder / "table.parquet")
    assert set(table.duplicate_of[1:]) == {table.names[0]}
    Image.new("RGB", (50, 50)).save(folder / "images" / "lot" / "05.png")
    images, encoder = opened(folder)
    assert embed_images(encoder, images, folder / "table.parquet")["embedded_now"] == 14
    ViTModel(encoder.vit.config, add_pooling_layer=False).save_pretrained(folder / "vit")
    images, encoder = opened(folder)
    assert embed_images(encoder, images, folder / "table.parquet")["embedded_now"] == 14


def test_two_commands_do_not_write_one_table(folder, capsys, monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE", 0.1)
    with FileLock(folder / ".table.parquet.lock"), pytest.raises(SystemExit):
        embed(folder)
    assert "another process is writing there" in capsys.readouterr().err.splitlines()[-1]
    assert len(embed(folder).names) == 13
    with FileLock(folder / ".table.parquet.lock"):  # a table that is there is only read
        assert len(embed(folder).names) == 13


def test_half_work_of_another_kind_is_begun_anew(folder, monkeypatch, caplog):
    images, encoder = opened(folder)
    partial.Work(folder / "table.parquet", "other", (14, 24), None).state_N[:] = partial.EMBEDDED
    record = embed_images(encoder, images, folder / "table.parquet")
    assert record["embedded_now"] == 14
    assert "holds other work" in caplog.text
    work = partial.Work(folder / "table.parquet", "same", (14, 24), (folder / "patches.npy", (14, 16, 24)))
    work.state_N[:] = partial.EMBEDDED
    work.state_N.flush()
    (folder / "patches.npy").unlink()
    work = partial.Work(folder / "table.parquet", "same", (14, 24), (folder / "patches.npy", (14, 16, 24)))
    assert (work.state_N == partial.WAITING).all()


def test_queries_find_their_like(folder, capsys):
    query = folder / "images" / "lot" / "07.png"
    embed(folder, "--query", str(query), "--nearest", "3")
    lines = capsys.readouterr().out.split(f"nearest to {query}\n")[1].splitlines()
    assert len(lines) == 3 and lines[0].split() == ["1.0000", str(query)]
    _, encoder = opened(folder)
    table = read_embeddings(folder / "table.parquet")
    (found,) = nearest_of_queries(encoder, [str(query)], table, 13)
    deviations = table.features_ND.double() - table.features_ND.double().mean(dim=0)
    cosines = torch.nn.functional.cosine_similarity(deviations, deviations[7][None])
    np.testing.assert_allclose([s for s, _ in found], np.sort(cosines.numpy())[::-1], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 90), queries=st.integers(1, 30), width=st.integers(1, 8), k=st.integers(1, 100),
    block=st.integers(1, 40), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_nearest_is_brute_force_whatever_the_blocks(count, queries, width, k, block, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator)
    asked = torch.randn(queries, width, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dbp.downstream.neighbours.BLOCK", block)
        similarities, rows = nearest(features, asked, k)
    every = asked.double() @ features.double().T
    expected = every.sort(dim=1, descending=True).values[:, : min(k, count)]
    torch.testing.assert_close(similarities.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(every.gather(1, rows), expected, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in rows.tolist())


def test_a_hundred_queries_among_ten_thousand_are_found_exactly():
    features = centred(torch.randn(10_000, 32))
    similarities, rows = nearest(features, features[:100], 10)
    every = features[:100].double() @ features.double().T
    assert torch.equal(rows, every.topk(10).indices)
    torch.testing.assert_close(similarities.double(), every.topk(10).values, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 60), block=st.integers(1, 30), threshold=st.floats(-0.5, 0.9), seed=st.integers(0, 10**6))
def test_near_duplicates_are_like_one_that_is_kept_and_those_kept_are_unlike(count, block, threshold, seed):
    features = torch.nn.functional.normalize(
        torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    similarity = (features @ features.T).numpy()
    near = np.abs(similarity - threshold).min() < 1e-5  # rounding may take it either way
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dbp.downstream.neighbours.BLOCK", block)
        first = near_duplicates(features, threshold)
    kept = np.flatnonzero(first == np.arange(count))
    assert set(first) == set(kept) and (first <= np.arange(count)).all()
    if not near:
        assert all(similarity[row, first[row]] >= threshold for row in range(count))
        assert all(similarity[a, b] < threshold for a in kept for b in kept if a != b)


def test_outliers_score_highest():
    features = centred(torch.cat([torch.randn(50, 8) * 0.01 + torch.ones(8), torch.tensor([[-9.0, 9] * 4])]))
    assert outlier_scores(features, 5).argmax() == 50


def test_the_built_in_images_have_a_table_too(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        num_channels=2,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    flags = ["--max_samples", "7", "--built_in_size", "32"]
    main(["embed", str(tmp_path / "vit"), "wire_bonding", "-o", str(tmp_path / "t.parquet"), *flags])
    table = read_embeddings(tmp_path / "t.parquet")
    assert table.features_ND.shape == (7, 16)
    assert table.record["data"]["source"]["dataset_name"] == "wire_bonding"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nearest", "0"], "--nearest and --batch_size are at least 1"),
        (["--split", "validation"], "has no split 'validation', only train"),
        (["--num_channels", "1"], "takes 3 channels, the images have 1"),
        (["--max_unreadable", "0"], "more than 0 unreadable images"),
        (["--query", "nowhere.png"], "nowhere.png"),
    ],
)
def test_mistakes_end_with_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        embed(folder, *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_other_files_are_no_tables(folder, capsys):
    (folder / "table.parquet").write_text(json.dumps({}))
    with pytest.raises(SystemExit):
        embed(folder)
    assert "is not a table of `hf-dbp embed`" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no such table; write it with hf-dbp embed VIT IMAGES -o"):
        read_embeddings(folder / "none.parquet")

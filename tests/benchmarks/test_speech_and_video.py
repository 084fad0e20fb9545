"""The data of the comparisons of other modalities."""

import shutil
import sys

import numpy as np
import pytest
from benchmark_scripts import load_benchmark
from datasets import Dataset
from PIL import Image

script = load_benchmark("speech_and_video")


def test_no_paragraph_is_read_twice_and_voices_of_validation_are_others():
    texts = script.paragraphs()
    assert len(texts) >= 460 and len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= script.CHARACTERS
    assert not set(script.VOICES) & set(script.OTHERS)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_speech_is_a_folder_of_splits(tmp_path, monkeypatch):
    flags = ["speech", "--train", "2", "--validation", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["speech_and_video.py", *flags])
    script.main()
    files = sorted(tmp_path.rglob("*.wav"))
    names = [str(file.relative_to(tmp_path)) for file in files]
    assert names == ["train/0000.wav", "train/0001.wav", "validation/0000.wav"]
    assert min(file.stat().st_size for file in files) > 10_000


def test_frames_are_named_by_sequence(tmp_path, monkeypatch):
    pictures = [Image.fromarray(np.full((4, 6, 3), shade, np.uint8)) for shade in (10, 20)]
    (tmp_path / "streets").mkdir()
    Dataset.from_dict({"image": pictures, "id": ["a_1", "a_2"]}).to_parquet(tmp_path / "streets" / "train.parquet")
    flags = ["video", str(tmp_path / "streets"), "--output_dir", str(tmp_path / "frames")]
    monkeypatch.setattr(sys, "argv", ["speech_and_video.py", *flags])
    script.main()
    assert sorted(file.name for file in (tmp_path / "frames").iterdir()) == ["a_1.png", "a_2.png"]
    assert np.asarray(Image.open(tmp_path / "frames" / "a_2.png")).max() == 20

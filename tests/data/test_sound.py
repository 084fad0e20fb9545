"""Folders of sound files: spectrograms of one channel, and pre-training on them."""

import io
import json

import numpy as np
import pytest
import soundfile

from hf_dbp import pretraining
from hf_dbp.data.readers import read_picture
from hf_dbp.data.sound import BANDS, log_mel


def tone(pitch, rate=16_000, seconds=1.0, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)
    return np.stack([wave] * channels, axis=1)


def content(samples, rate, kind="WAV"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_spectrogram_shows_pitch_by_row_and_time_by_column(kind, tmp_path):
    low, high = (read_picture(content(tone(pitch), 16_000, kind)) for pitch in (300, 3000))
    for image in (low, high):
        assert image.shape == (BANDS, 101, 1) and image.dtype == np.float32
        assert image.min() == 0.0 and image.max() == 1.0
    rows = [int(image[..., 0].mean(axis=1).argmax()) for image in (low, high)]
    assert rows[0] < 20 and rows[1] > 60
    both = log_mel(content(np.concatenate([tone(300), tone(3000)]), 16_000))[..., 0]
    assert [int(both[:, column].argmax()) for column in (50, 150)] == rows
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(content(tone(300), 16_000, kind))
    np.testing.assert_array_equal(read_picture(str(path)), low)


def test_rate_channels_and_loudness_do_not_matter():
    expected = log_mel(content(tone(440), 16_000))
    loud = expected > 0.5  # what rounding to 16 bits leaves alone
    loud[:, :3] = loud[:, -3:] = False  # the edges ring
    for samples, rate in (
        (tone(440, 48_000, channels=2), 48_000),
        (tone(440, 44_100), 44_100),
        (tone(440) / 8, 16_000),
    ):
        np.testing.assert_allclose(log_mel(content(samples, rate))[loud], expected[loud], atol=0.01)


def test_silence_short_and_damaged_sounds():
    assert log_mel(content(np.zeros((16_000, 1)), 16_000)).max() == 0.0
    assert log_mel(content(tone(440)[:10], 16_000)).shape[0] == BANDS
    for bad in (content(tone(440), 16_000, "FLAC")[:30], content(np.zeros((0, 1)), 16_000)):
        with pytest.raises(ValueError, match=r"damaged|expected at least one"):
            read_picture(bad)


@pytest.mark.slow
def test_pre_training_on_a_folder_of_sounds(tmp_path):
    for i in range(12):
        suffix = ("wav", "flac")[i % 2]
        soundfile.write(tmp_path / f"{i}.{suffix}", tone(200 * (i + 1), seconds=1 + i % 3), 16_000)
    pretraining.main([
        "--config", "audio.yaml", "--train_dir", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--use_cpu",
        "true", "--max_steps", "2", "--update_interval", "1", "--eval_steps", "2", "--save_steps", "2",
        "--dataloader_num_workers", "0",
        "--dataloader_persistent_workers", "false", "--per_device_train_batch_size", "4", "--disable_tqdm", "true",
    ])  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["results"]["finished"] and record["data"]["channels"] == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["image_size"] == [128, 64] and config["num_channels"] == 1

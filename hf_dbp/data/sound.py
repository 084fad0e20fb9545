"""Sound files as pictures of one channel: log-mel spectrograms, frequency by time.

    samples --mean of the channels, 16 kHz--> power of windows of 25 ms, every 10 ms --128 mel bands--> decibels

Decibels are relative to the loudest point of a recording: 1 is that point; 0 is 80 dB or more below it, or silence. One
second is 100 columns; the lowest band is the first row.

Shapes: F = 128 bands, T columns.
"""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_dbp.errors import UserError

__all__ = ["BANDS", "SOUND_FILES", "is_sound", "log_mel"]

SOUND_FILES = {".wav", ".flac"}
BANDS = 128
RATE, WINDOW, HOP, FFT = 16_000, 400, 160, 1024
RANGE, FLOOR = 80.0, -100.0  # dB; the power that counts as silence


def is_sound(head: bytes) -> bool:
    """Whether a file that begins with these (12) bytes is WAV or FLAC."""
    return head[:4] == b"fLaC" or (head[:4] == b"RIFF" and head[8:12] == b"WAVE")


@functools.cache
def filters() -> tuple[NDArray[Any], NDArray[Any]]:
    """The window (WINDOW,) and the mel filters (FFT / 2 + 1, F)."""
    from transformers.audio_utils import mel_filter_bank, window_function

    return window_function(WINDOW, "hann"), mel_filter_bank(
        FFT // 2 + 1, BANDS, 0.0, RATE / 2, RATE, "slaney", "slaney"
    )


def log_mel(file: str | bytes) -> NDArray[np.float32]:
    """The spectrogram (F, T, 1) of a sound file, in [0, 1].

    Args:
        file: path, or content of a file.

    Raises:
        ValueError: the file is damaged or has no samples, or soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise UserError("sound files need soundfile: pip install 'hf-dbp[audio]'") from error
    from scipy.signal import resample_poly
    from transformers.audio_utils import spectrogram

    try:
        samples, rate = soundfile.read(io.BytesIO(file) if isinstance(file, bytes) else file, always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"damaged ({error})") from error
    wave = samples.mean(axis=1)
    if not len(wave) or not np.isfinite(wave).all():
        raise UserError(f"it has {len(wave)} samples; expected at least one, and only finite ones")
    if rate != RATE:
        shared = math.gcd(rate, RATE)
        wave = resample_poly(wave, RATE // shared, rate // shared)
    window, mel = filters()
    wave = np.pad(wave, (0, max(0, FFT - len(wave))))
    power = spectrogram(
        wave, window, WINDOW, HOP, FFT, power=2.0, mel_filters=mel, log_mel="dB", min_value=10 ** (FLOOR / 10)
    )
    top = max(float(power.max()), FLOOR + RANGE)
    return np.asarray(np.clip((power - top) / RANGE + 1, 0.0, 1.0), np.float32)[..., None]

"""Loads data sets in a separate process, from the Hub that HF_ENDPOINT names; run by `test_hub_data.py`.

Reads a JSON list of `ImageSource` fields on stdin and writes one JSON line each: what was loaded, or the error.
"""

import contextlib
import json
import sys
import time

time.sleep = lambda seconds: None  # the Hub client's pauses between attempts
import datasets  # noqa: E402

from hf_dbp.data.images import ImageSource, load_images  # noqa: E402

datasets.disable_progress_bars()
for fields in json.load(sys.stdin):
    try:
        with contextlib.redirect_stdout(sys.stderr):
            train, validation = load_images(ImageSource(**fields))
            pixels = sum(int(image.sum()) for images in (train, validation) for image in images)
        keys = None if train.keys is None else train.keys.tolist()
        result = {"train": len(train), "validation": len(validation), "pixels": pixels, "keys": keys}
        print(json.dumps(result | {"first_pixels": int(train[0].sum())}), flush=True)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)

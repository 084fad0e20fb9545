"""Speech and video for comparisons of other modalities, from what a machine has.

    python benchmarks/speech_and_video.py speech --output_dir speech
    python benchmarks/speech_and_video.py video STREETS --output_dir video

speech: paragraphs of Python's own documentation, spoken by espeak-ng (Debian and Ubuntu: `apt install espeak-ng`), one
WAV file of at most a few seconds each. Folder `train` has the first eight voices, `validation` two others, which read
other paragraphs.

video: the frames of STREETS, a folder that `datasets.load_dataset` reads (CamVid), with a column `image` and a column
`id` that reads SEQUENCE_FRAME, as SEQUENCE_FRAME.png. Only its training split is taken.
"""

import argparse
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

from datasets import load_dataset
from tqdm import tqdm

VOICES = ["en-us", "en-gb", "en-us+m3", "en-gb+m5", "en-us+f2", "en-gb+f4", "en-us+m7", "en-gb-scotland"]
OTHERS = ["en-gb-x-rp+m2", "en-us+f5"]
CHARACTERS = 120  # of a spoken piece


def paragraphs() -> list[str]:
    """Pieces of prose, in a fixed order, without a repetition."""
    pieces = [" ".join(piece.split()) for _, text in sorted(topics.items()) for piece in text.split("\n\n")]
    prose = [
        piece
        for piece in pieces
        if len(piece) >= CHARACTERS and sum(c.isalpha() or c == " " for c in piece) > 0.9 * len(piece)
    ]
    return list(dict.fromkeys(piece[:CHARACTERS].rpartition(" ")[0] for piece in prose))


def speech(output_dir: Path, train: int, validation: int) -> None:
    texts = paragraphs()
    if len(texts) < train + validation:
        raise SystemExit(f"the documentation has {len(texts)} paragraphs of prose, not {train + validation}")
    parts = {"train": (texts[:train], VOICES), "validation": (texts[train : train + validation], OTHERS)}
    for split, (spoken, voices) in parts.items():
        (output_dir / split).mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(tqdm(spoken, desc=split)):
            file = output_dir / split / f"{number:04d}.wav"
            subprocess.run(["espeak-ng", "-v", voices[number % len(voices)], "-w", str(file), text], check=True)


def video(streets: str, output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for row in tqdm(load_dataset(streets, split="train"), desc="frames"):
        row["image"].save(output_dir / f"{row['id']}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    spoken = commands.add_parser("speech")
    spoken.add_argument("--train", type=int, default=400, help="recordings to train on")
    spoken.add_argument("--validation", type=int, default=60)
    frames = commands.add_parser("video")
    frames.add_argument("streets")
    for command in (spoken, frames):
        command.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "speech":
        speech(args.output_dir, args.train, args.validation)
    else:
        video(args.streets, args.output_dir)


if __name__ == "__main__":
    main()

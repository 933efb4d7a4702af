"""Generated photographs and a dataset prepared from them, as a user's would be: JPEG files, rows, `prepare`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmrlhf_jax.data.prepare import PrepareOptions, prepare

TEXT = (
    "the picture shows a small red boat under an old bridge near green water while two people walk along its left "
    "side and one of them carries a bright blue umbrella which is not open because there seems to be no rain today"
)
QUALITY = 90  # of the JPEG files


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise of every scale, about as much of each, as in photographs, whose amplitude falls with frequency. As a JPEG
    file 640 x 480 pixels take some 140 kB; the 118,287 files of COCO's train2017, most of that size, take 18 GB. White
    noise or a gradient would cost a decoder several times more or less."""
    total = np.zeros((height, width, 3), np.float32)
    power, cell = 0.0, 2
    while cell <= max(width, height):
        coarse = rng.normal(size=(-(-height // cell), -(-width // cell), 3)).astype(np.float32)
        channels = [Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        layer = np.stack([np.asarray(channel) for channel in channels], axis=-1)
        grey = layer.mean(-1, keepdims=True)  # the channels of a photograph mostly say the same
        total += cell**0.1 * (grey + 0.3 * (layer - grey))
        power += cell**0.2
        cell *= 2
    return Image.fromarray(np.clip(128 + 150 / np.sqrt(power) * total, 0, 255).astype(np.uint8))


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(TEXT.split(), words)) + "."


def prepare_photos(directory: Path, *, pictures: int, size: tuple[int, int], responses: int, words: int) -> str:
    """A prepared dataset of `pictures` groups, each one photograph of `size` (width, height), a question and
    `responses` ranked answers of `words` words; returns its path under `directory`."""
    rng, media, rows = np.random.default_rng(0), directory / "media", []
    media.mkdir(parents=True)
    for number in range(pictures):
        name = f"{number}.jpg"
        photo(rng, *size).save(media / name, quality=QUALITY)
        answers = [f"{k}: {sentence(rng, words)}" for k in range(responses)]
        asked = {"id": str(number), "image": name, "prompt": f"What is to be seen here? {sentence(rng, 20)}"}
        rows += [{**asked, "chosen": a, "rejected": b} for a, b in itertools.combinations(answers, 2)]
    written = directory / "pairs.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = str(directory / "dataset")
    prepare(PrepareOptions(source="mm_rlhf", inputs=(str(written),), output=output, media=str(media)))
    return output

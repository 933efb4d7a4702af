"""What TRL itself makes of the rows that `--source trl` reads, in files that `datasets` wrote."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from data_samples import embedded, picture, sorted_out
from etils import epath
from PIL import Image
from torchvision_shim import mend_torchvision

from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.groups import Group

mend_torchvision()
pytestmark = pytest.mark.parity

PICTURES = [picture(), picture(size=(7, 9))]


def read(dataset: Any, tmp_path: Path) -> list[Group]:
    file = str(tmp_path / "in.parquet")
    dataset.to_parquet(file)
    options = SourceOptions(store=PictureStore(epath.Path(tmp_path / "store")))
    groups, rejected, _ = sorted_out(read_source("trl", [file], options))
    assert rejected == {}
    return groups


def test_the_implicit_prompt_is_trl_s(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import extract_prompt

    shared = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "A."}]
    asked = {"role": "user", "content": "Two?"}
    rows = [
        {
            "chosen": [*turns, {"role": "assistant", "content": "good"}],
            "rejected": [*turns, {"role": "assistant", "content": "bad"}],
        }
        for turns in ([asked], [*shared, asked])
    ]
    groups = read(Dataset.from_list(rows), tmp_path)
    for row, group in zip(rows, groups, strict=True):
        theirs = extract_prompt(row)
        assert [(turn.role, turn.text) for turn in group.prompt] == [
            (m["role"], m["content"]) for m in theirs["prompt"]
        ]
        answers = [theirs[name][0]["content"] for name in ("chosen", "rejected")]
        assert [response.text for response in group.responses] == answers


def test_pictures_go_where_trl_puts_them(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature
    from trl.data_utils import prepare_multimodal_messages

    message = {"role": Value("string"), "content": Value("string")}
    features = Features(
        {name: List(message) for name in ("prompt", "chosen", "rejected")} | {"images": List(ImageFeature())}
    )
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "A."},
        {"role": "user", "content": "Two?"},
    ]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    images = [Image.open(io.BytesIO(data)) for data in PICTURES]
    dataset = Dataset.from_list([{"prompt": prompt, **answers, "images": images}], features=features)
    (group,) = read(dataset, tmp_path)
    theirs = prepare_multimodal_messages(prompt, images=images)
    counts = [sum(part["type"] == "image" for part in message["content"]) for message in theirs]
    assert list(group.media_before()) == counts
    stored = [(tmp_path / "store" / media.path).read_bytes() for media in group.media]
    assert [embedded(data) for data in stored] == list(group.media)
    assert [Image.open(io.BytesIO(data)).size for data in stored] == [(40, 30), (7, 9)]

"""Law 8: nothing is cut, no row stands in for another, every rejected row is listed with file, line and reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data_samples import WordCounter, picture, row, write_media, write_rows

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.groups import Response

# What is wrong with a row -> the beginning of the reason that is listed for it.
BAD: list[tuple[Any, str]] = [
    (row(chosen=""), "'chosen' is empty"),
    (row(rejected=None), "column 'rejected' is missing"),
    (row(rejected="good"), "'chosen' and 'rejected' are identical"),
    (row(video="clip"), "both 'image' and 'video' are set"),
    ("{not json", "invalid JSON"),
    (row(id="m", image="gone.png"), "'gone.png' is not under the media root"),
    (row(id="m", image="../in.jsonl"), "'../in.jsonl' leaves the media root"),
    (row(id="m", image="half.png"), "'half.png': picture cannot be decoded"),
    (row(id="m", image="text.png"), "'text.png': not a JPEG, PNG"),
    (row(id="m", image=["a.png", "gone.png"]), "'gone.png' is not under the media root"),
    (row(id="m", image=None, video="long"), "'long' has 4 frames, more than 3: raise --max-frames"),
    (row(id="long prompt", prompt="w " * 60), "71 tokens (prompt 70, longest response 1), more than --max-tokens 40"),
    (row(id="long answer", chosen="w " * 50), "61 tokens (prompt 11, longest response 50), more than --max-tokens 40"),
    (row(id="loop", chosen="b", rejected="c"), "preferences contradict each other"),
    (row(id="loop", chosen="c", rejected="b"), "preferences contradict each other"),
]


def test_every_row_is_in_a_group_or_in_the_list(tmp_path: Path) -> None:
    half = picture(size=(300, 200), format="JPEG")
    files = {f"long__{i}": picture() for i in range(4)} | {f"clip__{i}": picture() for i in range(3)}
    media = write_media(tmp_path / "media", a=picture(), half=half[: len(half) // 2], text=b"hello", **files)
    good = [row(id=f"good{i}", image=("a.png", None)[i % 2], rejected=f"bad{j}") for i in range(10) for j in range(3)]
    exact = row(id="exact", prompt="w " * 29)  # 29 words, a picture of 10, a response of 1: just 40
    lines = [*((g, "") for g in [*good, exact, row(id="v", image=None, video="clip")]), *BAD]
    random.Random(0).shuffle(lines)
    file = write_rows(tmp_path / "in.jsonl", [line for line, _ in lines])

    report = prepare(
        PrepareOptions(
            source="mm_rlhf",
            inputs=(file,),
            media=str(media),
            output=str(tmp_path / "out"),
            renderer=WordCounter(),
            max_tokens=40,
            max_frames=3,
            max_rejected=0.5,
        )
    )

    data = open_dataset(tmp_path / "out")
    listed = [json.loads(text) for text in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    expected = {number: reason for number, (_, reason) in enumerate(lines, 1) if reason}
    assert {r["line"] for r in listed} == set(expected)
    assert all(r["file"] == file and r["reason"].startswith(expected[r["line"]]) for r in listed)
    assert report.over_max_tokens == 2

    origins = [origin.line for group in data.groups() for origin in group.origins]
    assert sorted([*origins, *expected]) == list(range(1, len(lines) + 1))
    assert report.rows == len(lines) == len(origins) + len(listed)


def test_what_is_kept_is_kept_whole_and_in_its_own_place(tmp_path: Path) -> None:
    media = write_media(tmp_path / "media", a=picture(), b=picture(size=(8, 8)))
    texts = ["  spaces kept \n", "<image> in an answer", "<|im_end|> is text", "é\u202e\x1b[0m", "w " * 5000]
    rows = [row(id=str(i), image=("a.png", "b.png")[i % 2], chosen=text) for i, text in enumerate(texts)]
    rows.insert(2, row(id="bad", image="gone.png"))
    file = write_rows(tmp_path / "in.jsonl", rows)
    prepare(PrepareOptions("mm_rlhf", (file,), str(tmp_path / "out"), media=str(media), max_rejected=0.5))
    data = open_dataset(tmp_path / "out")
    assert [group.responses for group in data.groups()] == [(Response(text), Response("bad", 1)) for text in texts]
    for i in range(len(texts)):
        group = data.with_media(i)
        assert group.id == str(i)
        assert group.media[0].encoded == ((media / ("a.png", "b.png")[i % 2]).read_bytes(),)

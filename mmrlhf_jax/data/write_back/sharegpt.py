"""LLaMA-Factory's preference layout: a directory that serves as its `dataset_dir`, with `dataset: preferences`.

    dataset_info.json    what LLaMA-Factory knows the rows by
    preferences.jsonl    {conversations: [{from, value}], chosen: {from, value}, rejected, images, margin, id}
    picture-<sha256>.*   each picture once

`<image>` stands before the text of a turn, once for each of its pictures. `images` are paths from the directory, which
LLaMA-Factory takes for its media directory too, and `--media` of prepare. A system turn is the first of the
conversations. LLaMA-Factory counts these tags in the texts, so a text that spells one cannot be written.

Source: LLaMA-Factory, data/README.md, src/llamafactory/data/converter.py and mm_plugin.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmrlhf_jax.command import progress_line
from mmrlhf_jax.data.datasets import Dataset
from mmrlhf_jax.data.media import suffix_of
from mmrlhf_jax.data.write_back.selection import Chosen, pairs_in
from mmrlhf_jax.groups import Group, Media

NAME = "preferences"
FILE = f"{NAME}.jsonl"
INFO = "dataset_info.json"
TAGS = ("<image>", "<video>", "<audio>")

_FROM = {"user": "human", "assistant": "gpt", "system": "system"}


def problem(group: Group) -> str | None:
    """Why LLaMA-Factory would misread the group."""
    texts = [turn.text for turn in group.prompt] + [response.text for response in group.responses]
    if spelt := [tag for tag in TAGS for text in texts if tag in text]:
        return f"a text spells {spelt[0]}, which LLaMA-Factory takes for a picture's place"
    spoken = [turn.role for turn in group.prompt[group.prompt[0].role == "system" :]]
    if len(spoken) % 2 == 0 or any(role != ("user", "assistant")[n % 2] for n, role in enumerate(spoken)):
        return "user and assistant do not take turns, which LLaMA-Factory skips"
    return None


def write(dataset: Dataset, chosen: Chosen, directory: Path, progress: bool) -> None:
    """Write the chosen rows of `dataset` into `directory`."""
    (directory / INFO).write_text(json.dumps({NAME: _info(chosen)}, indent=2) + "\n")
    with (directory / FILE).open("w", encoding="utf-8", newline="\n") as file:
        for number in progress_line(chosen.rows, desc="writing", unit="group", disable=not progress):
            group = dataset.with_media(number)
            images = [_put(media, directory) for media in group.media]
            for row in _rows(group, images, chosen):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _info(chosen: Chosen) -> dict[str, Any]:
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    if chosen.media:
        columns["images"] = "images"
    return {"file_name": FILE, "formatting": "sharegpt", "ranking": True, "columns": columns}


def _put(media: Media, directory: Path) -> str:
    name = f"picture-{media.sha256}{suffix_of(media.encoded[0])}"
    if not (directory / name).exists():
        (directory / name).write_bytes(media.encoded[0])
    return name


def _rows(group: Group, images: list[str], chosen: Chosen) -> list[dict[str, Any]]:
    counts = group.media_before()
    said = [
        {"from": _FROM[turn.role], "value": _tagged(turn.text, count)}
        for turn, count in zip(group.prompt, counts, strict=True)
    ]
    rows = []
    for pair in pairs_in(group):
        row: dict[str, Any] = {
            "id": group.id,
            "conversations": said,
            "chosen": {"from": "gpt", "value": pair.chosen},
            "rejected": {"from": "gpt", "value": pair.rejected},
        }
        if chosen.media:
            row["images"] = images
        if chosen.margins:
            row["margin"] = pair.margin
        rows.append(row)
    return rows


def _tagged(text: str, pictures: int) -> str:
    """A reader takes a line break behind a tag for part of it, so a text that begins with one gets another."""
    return "<image>" * pictures + ("\n" if pictures and text.startswith("\n") else "") + text

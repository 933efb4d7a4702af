"""The questions of online rounds: each round asks its own share of a file, in the format of launch/generate.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.data.digit_boards.world import read_questions
from mmrlhf_jax.data.report import SHOWN
from mmrlhf_jax.data.sources.rows import Rejected, read_rows
from mmrlhf_jax.inference.prompts import MISTAKEN
from mmrlhf_jax.storage import to_path, write_whole


@dataclass(frozen=True)
class Prompt:
    """A question under its id; `image` and `video` as the file has them, None where it has none."""

    id: str
    question: str
    image: Any = None
    video: Any = None

    def row(self) -> dict[str, Any]:
        """As launch/generate.py reads it."""
        return {"id": self.id, "prompt": self.question, "image": self.image, "video": self.video}


def read_prompt_file(file: str) -> list[Prompt]:
    """All rows of JSON lines or of a JSON array. Raises CommandError with the lines that cannot be used."""
    prompts: dict[str, Prompt] = {}
    bad: list[str] = []
    for row in read_rows([file]):
        if isinstance(row, Rejected):
            bad.append(f"{row.origin}: {row.reason}")
            continue
        fields = row.fields
        name = str(row.origin.line if fields.get("id") is None else fields["id"])
        if not isinstance(fields.get("prompt"), str):
            bad.append(f"{row.origin}: 'prompt' is no string; rounds ask one question at a time")
        elif name in prompts:
            bad.append(f"{row.origin}: id {name!r} stands on an earlier line too")
        elif mistaken := [name for name in MISTAKEN if fields.get(name)]:
            bad.append(f"{row.origin}: {mistaken[0]!r} is not read; name it {MISTAKEN[mistaken[0]]!r}")
        elif not (_is_json(fields.get("image")) and _is_json(fields.get("video"))):
            bad.append(f"{row.origin}: its picture is bytes; save it as a file and name its path")
        else:
            prompts[name] = Prompt(name, fields["prompt"], fields.get("image"), fields.get("video"))
    if bad or not prompts:
        raise CommandError("\n  ".join([f"{file}: {len(bad)} rows cannot be asked", *bad[:SHOWN]]))
    return list(prompts.values())


def _is_json(picture: Any) -> bool:
    try:
        json.dumps(picture)
    except TypeError:
        return False
    return True


def prompts_of_world(world: Path, split: str) -> list[Prompt]:
    """The questions of one split of a world of digit boards."""
    rows = read_questions(world, split)
    return [Prompt(row["id"], row["question"], row.get("image"), row.get("video")) for row in rows]


def shares(prompts: Sequence[Prompt], rounds: int, each: int | None, seed: int) -> list[list[Prompt]]:
    """Of each round its own prompts: `each` of them, or as many as there are for all rounds alike.

    Which ones hangs on ids and `seed` alone, so that more rounds add shares and change none where `each` is given.
    Raises CommandError where there are too few.
    """
    count = len(prompts) // rounds if each is None else each
    if not count or count * rounds > len(prompts):
        raise CommandError(
            f"{rounds} rounds of {count or 1} prompts need {rounds * max(count, 1)}, there are {len(prompts)}: ask "
            "fewer a round, or more rounds of another file"
        )
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest())
    return [order[number * count : (number + 1) * count] for number in range(rounds)]


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(to_path(file), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]

"""A prepared dataset as rows of TRL and LLaMA-Factory, and back again."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_samples import picture, write_media, write_rows
from PIL import Image

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.data.write_back import WriteBackError, write_back
from mmrlhf_jax.groups import Group

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "export_data.py"
FORMS = ["trl", "sharegpt"]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def row(chosen: str, rejected: str, *said: dict[str, str], m: float | None = 1.0, **fields: Any) -> dict[str, Any]:
    row = {"conversations": list(said), "chosen": gpt(chosen), "rejected": gpt(rejected), "m": m, **fields}
    return {key: value for key, value in row.items() if value is not None}


ASKED = human("<image>What?")
TURNS = (human("<image>One?"), gpt("A cat, \u732b."), human("<image><image>\n\n and two?"))
ROWS = [
    row("best", "good", ASKED, images=["a.png"], m=0.25),
    row("best", "bad", ASKED, images=["a.png"], m=3.0),
    row("good", "bad", ASKED, images=["a.png"], m=2.75),
    row("a \n", " b", *TURNS, images=["a.png", "b.png", "a.png"], m=-1.0, system="Be brief."),
    row("yes", "no", human("No picture?"), m=0.0),
    {"conversations": [ASKED, gpt("alone")], "images": ["b.png"], "m": 1.0},
]


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., str]:
    def make(rows: list[Any], margin: str | None = "m", name: str = "data", a: bytes = picture()) -> str:
        write_media(tmp_path / "media", a=a, frame__1=picture(), frame__2=picture(size=(7, 9)))
        (tmp_path / "media" / "b.png").write_bytes(picture(format="JPEG", size=(50, 20)))  # its name lies
        output = str(tmp_path / name)
        prepare(
            PrepareOptions(
                "sharegpt",
                (write_rows(tmp_path / f"{name}.jsonl", rows),),
                output,
                media=str(tmp_path / "media") if any("images" in row or "videos" in row for row in rows) else None,
                source_options=SourceOptions(margin_column=margin),
            )
        )
        return output

    return make


def stated(groups: Any) -> list[Any]:
    """Of each group with pairs: what is asked about which pictures, and every pair with its margin."""

    def pairs(group: Group) -> set[Any]:
        texts = [response.text for response in group.responses]
        return {(texts[pair.chosen], texts[pair.rejected], group.margin(pair)) for pair in group.pairs}

    return [
        (
            [(turn.role, turn.text) for turn in group.prompt],
            group.media_before(),
            [(media.kind, media.sha256) for media in group.media],
            pairs(group),
        )
        for group in groups
        if group.pairs
    ]


def back(form: str, directory: Path, output: Path, margin: bool = True) -> Any:
    """What our own reader makes of the rows."""
    file = directory / ("train.parquet" if form == "trl" else "preferences.jsonl")
    options = PrepareOptions(
        form,
        (str(file),),
        str(output),
        media=None if form == "trl" else str(directory),
        source_options=SourceOptions(margin_column="margin" if margin else None),
    )
    report = prepare(options)
    assert report.rejected == ()
    assert report.remarks == ()
    return open_dataset(str(output))


@pytest.mark.parametrize("form", FORMS)
def test_rows_written_and_read_are_the_same_pairs(form: Any, prepared: Any, tmp_path: Path) -> None:
    dataset = open_dataset(prepared(ROWS))
    written = write_back(dataset, form, str(tmp_path / "rows"))
    assert written.chosen.lines() == ["5 pairs of 3 groups", "not written: 1 groups without pairs"]
    again = back(form, tmp_path / "rows", tmp_path / "again")
    assert stated(again.groups()) == stated(dataset.groups())
    ours, theirs = (
        [[media.encoded for media in data.with_media(n).media] for n in range(len(data)) if data.group(n).pairs]
        for data in (dataset, again)
    )
    assert ours == theirs


@pytest.mark.parametrize("form", FORMS)
def test_margins_are_written_only_where_all_pairs_have_one(form: Any, prepared: Any, tmp_path: Path) -> None:
    dataset = open_dataset(prepared(ROWS[:5], margin=None))
    written = write_back(dataset, form, str(tmp_path / "rows"))
    assert written.chosen.lines() == ["5 pairs of 3 groups"]
    assert stated(back(form, tmp_path / "rows", tmp_path / "again", margin=False).groups()) == stated(dataset.groups())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_lost_is_counted(form: Any, tmp_path: Path) -> None:
    lines = [
        {"q": "One?", "a": ["x", "y", "z"], "s": [1, 3, None], "r": [2, 1, 2], "w": ["so", None, None]},
        {"q": "Two?", "a": ["x", "y"], "s": [1, 3], "r": [1, 1]},
    ]
    mapping = {"prompt": "q", "responses": "a", "score": "s", "rank": "r", "reason": "w"}
    lines[1]["w"] = [None, None]
    file = write_rows(tmp_path / "in.jsonl", lines)
    prepare(PrepareOptions("mapped", (file,), str(tmp_path / "data"), source_options=SourceOptions(mapping)))
    written = write_back(open_dataset(str(tmp_path / "data")), form, str(tmp_path / "rows"))
    assert written.chosen.lines() == [
        "2 pairs of 1 groups",
        "not written: 1 groups without pairs",
        "not written: 1 reasons",
        "not written: 1 margins, since other pairs have none",
    ]


def test_llama_factory_s_layout(prepared: Any, tmp_path: Path) -> None:
    write_back(open_dataset(prepared(ROWS)), "sharegpt", str(tmp_path / "rows"))
    info = json.loads((tmp_path / "rows" / "dataset_info.json").read_text())
    assert info == {
        "preferences": {
            "file_name": "preferences.jsonl",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {
                "messages": "conversations",
                "chosen": "chosen",
                "rejected": "rejected",
                "images": "images",
            },
        }
    }
    lines = [json.loads(line) for line in (tmp_path / "rows" / "preferences.jsonl").read_text().splitlines()]
    for line in lines:
        said = "".join(message["value"] for message in line["conversations"])
        assert said.count("<image>") == len(line["images"])
        assert all((tmp_path / "rows" / name).exists() for name in line["images"])
    suffixes = sorted(file.suffix for file in (tmp_path / "rows").glob("picture-*"))
    assert suffixes == [".jpg", ".png"]  # each once, named as what they are
    assert [message["from"] for message in lines[3]["conversations"]] == ["system", "human", "gpt", "human"]


def test_a_row_group_is_bounded_and_holds_a_picture_once(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrlhf_jax.data.write_back import trl

    answers = [chr(97 + i) for i in range(8)]
    rows = [row(x, y, ASKED, images=["a.png"]) for i, x in enumerate(answers) for y in answers[i + 1 :]]
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)).save(noise, "PNG")
    dataset = open_dataset(prepared(rows, a=noise.getvalue()))
    write_back(dataset, "trl", str(tmp_path / "rows"))
    whole = pq.ParquetFile(tmp_path / "rows" / "train.parquet")
    assert (whole.metadata.num_rows, whole.metadata.num_row_groups) == (28, 1)
    assert (tmp_path / "rows" / "train.parquet").stat().st_size < 2 * len(noise.getvalue())
    monkeypatch.setattr(trl, "ROW_GROUP_ROWS", 10)
    write_back(dataset, "trl", str(tmp_path / "parts"))
    parts = pq.ParquetFile(tmp_path / "parts" / "train.parquet")
    assert [parts.metadata.row_group(n).num_rows for n in range(parts.num_row_groups)] == [10, 10, 8]
    assert parts.read().equals(whole.read())


def test_text_alone_has_no_column_of_pictures(prepared: Any, tmp_path: Path) -> None:
    dataset = open_dataset(prepared([ROWS[4]]))
    write_back(dataset, "trl", str(tmp_path / "trl"))
    assert pq.read_schema(tmp_path / "trl" / "train.parquet").names == ["prompt", "chosen", "rejected", "margin"]
    write_back(dataset, "sharegpt", str(tmp_path / "sharegpt"))
    assert "images" not in (tmp_path / "sharegpt" / "preferences.jsonl").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_videos_are_refused_or_left_out(form: Any, prepared: Any, tmp_path: Path) -> None:
    dataset = open_dataset(prepared([*ROWS[:1], row("a", "b", human("<video>What?"), videos=["frame"])]))
    with pytest.raises(WriteBackError, match=rf"1 groups have what rows of {form} cannot hold:\n  .*a video"):
        write_back(dataset, form, str(tmp_path / "rows"))
    assert not (tmp_path / "rows").exists()
    written = write_back(dataset, form, str(tmp_path / "rows"), skip_videos=True)
    assert written.chosen.lines() == ["1 pairs of 1 groups", "not written: 1 groups with videos"]


def test_a_text_that_spells_a_tag_is_refused_where_it_would_be_one(tmp_path: Path) -> None:
    lines = [{"prompt": f"{n} Why <image>?", "chosen": "a", "rejected": "b"} for n in range(5)]
    file = write_rows(tmp_path / "in.jsonl", lines)
    prepare(PrepareOptions("trl", (file,), str(tmp_path / "data")))
    dataset = open_dataset(str(tmp_path / "data"))
    with pytest.raises(WriteBackError, match=r"5 groups have(.|\n)*a text spells <image>(.|\n)*\.\.\. and 2 more"):
        write_back(dataset, "sharegpt", str(tmp_path / "rows"))
    write_back(dataset, "trl", str(tmp_path / "rows"))  # its parts are no tags
    assert stated(back("trl", tmp_path / "rows", tmp_path / "again", margin=False).groups()) == stated(dataset.groups())


def test_turns_that_llama_factory_skips_are_refused(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "One?"}, {"role": "user", "content": "Two?"}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": prompt, **answers}])
    prepare(PrepareOptions("trl", (file,), str(tmp_path / "data")))
    dataset = open_dataset(str(tmp_path / "data"))
    with pytest.raises(WriteBackError, match="user and assistant do not take turns, which LLaMA-Factory skips"):
        write_back(dataset, "sharegpt", str(tmp_path / "rows"))
    write_back(dataset, "trl", str(tmp_path / "rows"))
    assert stated(back("trl", tmp_path / "rows", tmp_path / "again", margin=False).groups()) == stated(dataset.groups())


def test_an_output_is_found_written_and_others_are_left_alone(prepared: Any, tmp_path: Path) -> None:
    dataset = open_dataset(prepared(ROWS))
    aside = tmp_path / ".rows.writing"
    aside.mkdir()
    (aside / "left by a killed run").touch()
    assert not write_back(dataset, "trl", str(tmp_path / "rows")).reused
    assert not aside.exists()
    assert sorted(file.name for file in (tmp_path / "rows").iterdir()) == [".written_from.json", "train.parquet"]
    assert write_back(dataset, "trl", str(tmp_path / "rows")).reused
    for form, output in (("sharegpt", tmp_path / "rows"), ("trl", tmp_path)):
        with pytest.raises(WriteBackError, match="exists and was not written from this dataset in this way"):
            write_back(dataset, form, str(output))  # type: ignore[arg-type]
    with pytest.raises(WriteBackError, match="no group has a pair that could be written"):
        write_back(open_dataset(prepared(ROWS[5:], name="alone")), "trl", str(tmp_path / "none"))


def test_the_program(prepared: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(LAUNCH), prepared(ROWS), "--as", "trl", "--output", str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = "5 pairs of 3 groups\nnot written: 1 groups without pairs\n"
    assert done.stdout == f"wrote {tmp_path / 'rows'} (trl)\n{counted}"
    refused = subprocess.run([*command, "--as", "alpaca"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2

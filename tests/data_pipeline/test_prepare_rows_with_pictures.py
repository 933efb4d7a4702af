"""`launch/prepare.py` on data people own: pictures inside the rows, each source from end to end, a limit."""

from __future__ import annotations

import base64
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import WordCounter, embedded, picture, row, write_media, write_parquet, write_rows

from mmrlhf_jax.data import prepare as prepare_module
from mmrlhf_jax.data.dataset import DatasetError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareError, PrepareOptions, prepare
from mmrlhf_jax.groups import Group, Pair

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "prepare.py"
A, B = picture(), picture(format="JPEG", size=(50, 20))
CUT = B[:-40]


def struct(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


ROWS = [
    row(image=struct(A), chosen="best", rejected="good"),
    row(image=struct(B), id="r"),
    row(image=struct(A, "again.png")),
]


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., PrepareOptions]:
    def make(rows: list[Any], **changes: Any) -> PrepareOptions:
        file = write_parquet(tmp_path / "in.parquet", rows)
        defaults = {"source": "mm_rlhf", "inputs": (file,), "output": str(tmp_path / "out")}
        return PrepareOptions(**{**defaults, **changes})

    return make


def prepared(path: Path | str) -> list[Group]:
    data = open_dataset(path)
    return [data.with_media(row) for row in range(len(data))]


def test_pictures_in_rows_need_no_media_root_and_are_proven_once(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    verify = prepare_module.verify_media
    monkeypatch.setattr(prepare_module, "verify_media", lambda m, root: verified.append(m.path) or verify(m, root))
    report = prepare(options(ROWS))
    assert (report.rows, report.groups, report.pictures) == (3, 2, 2)
    first, second = prepared(options(ROWS).output)
    assert [media.encoded for media in (*first.media, *second.media)] == [(A,), (B,)]
    assert [media.sizes for media in (*first.media, *second.media)] == [((40, 30),), ((50, 20),)]
    assert [r.text for r in first.responses] == ["best", "good", "bad"]
    assert sorted(verified) == sorted([embedded(A).path, embedded(B).path])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out"]


def test_a_broken_picture_in_a_row_is_rejected_by_file_and_row(options: Any, tmp_path: Path) -> None:
    rows = [*ROWS, row(id="broken", image=struct(CUT)), row(id="none", image=struct(b""))]
    report = prepare(options(rows, max_rejected=0.5))
    assert report.rows == 5 == sum(len(group.origins) for group in prepared(tmp_path / "out")) + len(report.rejected)
    reasons = {str(rejected.origin): rejected.reason for rejected in report.rejected}
    assert list(reasons) == [f"{tmp_path}/in.parquet:5", f"{tmp_path}/in.parquet:4"]
    assert reasons[f"{tmp_path}/in.parquet:5"] == "'image'.bytes is empty"
    assert "picture cannot be decoded" in reasons[f"{tmp_path}/in.parquet:4"]
    assert embedded(CUT).path in reasons[f"{tmp_path}/in.parquet:4"]


def test_what_an_interrupted_or_failed_run_leaves_is_cleared(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".out.pictures"

    def killed(sorting: Any, given: Any) -> Any:
        assert len(list(left.iterdir())) == 2  # while it works the pictures lie there
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_prove_media", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(ROWS))
    assert not left.exists()

    for _ in ("before the work", "when it is done already"):
        write_media(left, junk=b"of a killed run")
        prepare(options(ROWS))
        assert not left.exists()

    with pytest.raises(PrepareError, match="more than --max-rejected"):
        prepare(options([row(image=struct(A)), row(image=struct(B), chosen="")], output=str(tmp_path / "other")))
    assert not (tmp_path / ".other.pictures").exists()


def test_pictures_by_path_beside_pictures_in_rows(options: Any, tmp_path: Path) -> None:
    rows = [row(image=struct(A)), row(id="r", image=struct(None, "b.png"))]
    with pytest.raises(PrepareError, match="give their root with --media"):
        prepare(options(rows))
    prepare(options(rows, media=str(write_media(tmp_path / "media", b=B))))
    assert [group.media[0].encoded for group in prepared(tmp_path / "out")] == [(A,), (B,)]


def test_a_limit_keeps_the_first_groups_and_belongs_to_the_fingerprint(options: Any, tmp_path: Path) -> None:
    report = prepare(options(ROWS, limit=1))
    assert (report.rows, report.groups) == (2, 1)
    assert "note       --limit 1: rows of further groups are left out (1 rows)" in report.lines()
    assert [group.id for group in prepared(tmp_path / "out")] == ["q"]
    assert prepare(options(ROWS, limit=1)).reused
    for other in (None, 2):
        with pytest.raises(DatasetError, match="different: limit"):
            prepare(options(ROWS, limit=other))
    assert "limit" not in prepare_module._metadata(options(ROWS))
    assert prepare(options(ROWS, limit=2, output=str(tmp_path / "all"))).remarks == ()


def test_lengths_are_counted_for_pictures_in_rows(options: Any) -> None:
    assert prepare(options(ROWS, renderer=WordCounter())).lengths["prompt"].max == 11


# The program, on each source.


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs it in this process and returns what it printed; a failure would be a SystemExit."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(LAUNCH), *arguments])
        runpy.run_path(str(LAUNCH), run_name="__main__")
        return capsys.readouterr().out

    return run


def said(role: str, text: str, *kinds: str) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}


def test_a_trl_parquet_from_end_to_end(tmp_path: Path, program: Any) -> None:
    prompt = [said("user", "One?", "image"), said("assistant", "A."), said("user", "Two?", "image")]
    base = {"prompt": prompt, "images": [struct(A), struct(B)], "chosen": [said("assistant", "good")]}
    rows = [{**base, "rejected": [said("assistant", text)], "gap": gap} for text, gap in (("bad", 0.5), ("awful", 2.0))]
    file = write_parquet(tmp_path / "in.parquet", rows)
    printed = program(
        *("--source", "trl", "--input", file, "--output", str(tmp_path / "out"), "--margin-column", "gap")
    )
    assert "2 read, 0 rejected" in printed
    (group,) = prepared(tmp_path / "out")
    assert group.media_before() == (1, 0, 1)
    assert [media.encoded for media in group.media] == [(A,), (B,)]
    assert [(r.text, r.rank) for r in group.responses] == [("good", 0), ("bad", 1), ("awful", 1)]
    assert group.pairs == (Pair(0, 1, 0.5), Pair(0, 2, 2.0))


def test_sharegpt_json_lines_from_end_to_end(tmp_path: Path, program: Any) -> None:
    uri = f"data:image/png;base64,{base64.b64encode(A).decode()}"
    rows = [
        {
            "chat": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}],
            "images": [uri],
        },
        {
            "chat": [{"from": "human", "value": "<image>What?"}],
            "images": ["b.png"],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ]
    media = write_media(tmp_path / "media", b=B)
    arguments = ["--input", write_rows(tmp_path / "in.jsonl", rows), "--media", str(media), "--map", "messages=chat"]
    program("--source", "sharegpt", *arguments, "--output", str(tmp_path / "out"))
    alone, compared = prepared(tmp_path / "out")
    assert (alone.media[0].encoded, alone.pairs) == ((A,), ())
    assert (compared.media[0].encoded, compared.pairs) == ((B,), (Pair(0, 1),))


def test_an_rlaif_v_parquet_from_end_to_end(tmp_path: Path, program: Any) -> None:
    base = {"ds_name": "RLAIF-V", "question": "What?", "chosen": "good", "idx": 3, "image_path": "x.jpg"}
    rows = [{**base, "image": struct(A, "x.jpg"), "rejected": text} for text in ("bad", "awful", "bad")]
    file = write_parquet(tmp_path / "in.parquet", rows)
    printed = program("--source", "rlhf_v", "--input", file, "--output", str(tmp_path / "out"), "--limit", "5")
    assert "3 read, 0 rejected, 1 duplicates" in printed
    (group,) = prepared(tmp_path / "out")
    assert (group.id, group.media[0].encoded, len(group.pairs)) == ("3", (A,), 2)
    assert [origin.line for origin in group.origins] == [1, 2]

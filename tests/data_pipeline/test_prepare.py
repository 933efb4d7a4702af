from __future__ import annotations

import contextlib
import json
import pickle
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import SHARED, WordCounter, picture, row, write_media, write_rows

from mmrlhf_jax.data import dataset as dataset_module
from mmrlhf_jax.data import prepare as prepare_module
from mmrlhf_jax.data.dataset import DatasetError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareError, PrepareOptions, prepare
from mmrlhf_jax.data.report import Spread
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.groups import Origin

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "prepare.py"


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., PrepareOptions]:
    media = write_media(
        tmp_path / "media",
        a=picture(),
        b=picture(format="JPEG", size=(50, 20)),
        clip__1=picture(),
        clip__2=picture(size=(7, 9)),
    )

    def make(rows: list[Any], **changes: Any) -> PrepareOptions:
        file = write_rows(tmp_path / "in.jsonl", rows)
        defaults = {"source": "mm_rlhf", "inputs": (file,), "media": str(media), "output": str(tmp_path / "out")}
        return PrepareOptions(**{**defaults, **changes})

    return make


MIXED = [
    row(chosen="best", rejected="good"),
    row(id="several", image=["a.png", "b.png"]),
    row(id="clip", image=None, video="clip"),
    row(chosen="best", rejected="bad"),
    row(id="text", image=None),
    row(),
]


def test_what_is_prepared_is_what_was_read(options: Any) -> None:
    report = prepare(options(MIXED))
    data = open_dataset(report_path := options(MIXED).output)
    assert [group.id for group in data.groups()] == ["q", "several", "clip", "text"]
    assert [data.group(row) for row in range(len(data))] == list(data.groups())
    assert data.fingerprint == report.fingerprint
    assert report_path == data.path

    with_media = [data.with_media(row) for row in range(len(data))]
    assert [[len(m.encoded) for m in group.media] for group in with_media] == [[1], [1, 1], [2], []]
    several = with_media[1].media
    assert [m.encoded[0] for m in several] == [picture(), picture(format="JPEG", size=(50, 20))]
    assert [m.sizes for m in several] == [((40, 30),), ((50, 20),)]
    assert with_media[2].media[0].sizes == ((40, 30), (7, 9))
    assert with_media[0].origins == (*(Origin(str(options(MIXED).inputs[0]), n) for n in (1, 4, 6)),)


def test_nothing_is_left_in_the_folder_for_temporary_files(options: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    prepare(options(MIXED))
    assert list(temporary.iterdir()) == []


def test_shards_keep_the_order(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "SHARD_BYTES", 700)
    rows = [row(id=str(i), image="a.png" if i % 3 else None) for i in range(25)]
    prepare(options(rows))
    data = open_dataset(options(rows).output)
    assert len(list(Path(data.path).glob("*-groups.*"))) > 5
    assert len(list(Path(data.path).glob("*-media.*"))) > 1
    assert [group.id for group in data.groups()] == [str(i) for i in range(25)]
    assert [len(data.with_media(i).media) for i in range(25)] == [int(i % 3 > 0) for i in range(25)]


def test_an_open_dataset_travels_to_another_process(options: Any) -> None:
    prepare(options(MIXED))
    data = open_dataset(options(MIXED).output)
    assert data.with_media(0) == pickle.loads(pickle.dumps(data)).with_media(0)


def test_rows_outside_are_refused(options: Any) -> None:
    prepare(options(MIXED))
    data = open_dataset(options(MIXED).output)
    for outside in (-1, 4):
        with pytest.raises(IndexError, match=rf"has rows 0\.\.3, not {outside}"):
            data.with_media(outside)


def test_the_report_counts(options: Any) -> None:
    mixed = [*MIXED, MIXED[0], row(id="tied", is_tie=True), row(id="gone", image="gone.png"), row(id="x", extra=1)]
    report = prepare(options(mixed, renderer=WordCounter(), max_rejected=0.2))
    assert report.rows == 10
    assert report.groups == 6
    assert report.responses == {2: 5, 3: 1}
    assert (report.pairs, report.ties, report.without_pairs) == (7, 1, 1)
    assert (report.complete, report.partial) == (6, 0)
    assert (report.pictures, report.videos, report.frames, report.text_only) == (5, 1, 2, 1)
    assert report.duplicates == 1
    assert report.rejected_share == 1 / 9
    assert report.lengths["prompt"] == Spread(min=1, median=11, p90=21, max=21)
    assert report.lengths["tiles"] == Spread(min=0, median=1, p90=2, max=2)
    text = "\n".join(report.lines())
    assert "10 read, 1 rejected, 1 duplicates" in text
    assert "K=2: 5, K=3: 1" in text
    assert "column 'extra' is not read (1 rows)" in text
    assert "in.jsonl:9: 'gone.png' is not under the media root" in text


def test_a_partial_order_is_counted_and_stays_partial(options: Any) -> None:
    report = prepare(options([row(chosen="a", rejected="b"), row(chosen="b", rejected="c")]))
    assert (report.complete, report.partial, report.pairs) == (0, 1, 2)


def test_control_characters_of_data_do_not_reach_the_terminal(options: Any) -> None:
    report = prepare(options([row(), row(id="x", image="\x1b[31m\u202e.png")], max_rejected=1.0))
    assert not {"\x1b", "\u202e"} & set("".join(report.lines()))
    assert "\x1b" in report.rejected[0].reason or "\\x1b" in report.rejected[0].reason


# Doing it again.


def test_the_same_inputs_are_done_already(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*MIXED, row(id="bad", chosen="")]
    first = prepare(options(rows, renderer=WordCounter(), max_rejected=0.5))
    monkeypatch.setattr(prepare_module, "_read", lambda options: pytest.fail("read again"))
    again = prepare(options(rows, renderer=WordCounter(), max_rejected=0.5))
    assert again.reused
    assert again.lines() == first.lines()
    with pytest.raises(PrepareError, match="more than --max-rejected 0:"):
        prepare(options(rows, renderer=WordCounter(), max_rejected=0.0))


def test_other_inputs_into_the_same_directory_name_both_fingerprints(options: Any) -> None:
    first = prepare(options(MIXED))
    with pytest.raises(DatasetError, match="choose another --output") as failure:
        prepare(options([*MIXED, row(id="more")]))
    prints = re.findall(r"\b[0-9a-f]{64}\b", str(failure.value))
    assert prints[0] == first.fingerprint
    assert len(set(prints)) == 2
    assert "different: inputs" in str(failure.value)
    with pytest.raises(DatasetError, match="different: max_frames"):
        prepare(options(MIXED, max_frames=5))
    assert [group.id for group in open_dataset(options(MIXED).output).groups()] == ["q", "several", "clip", "text"]


def test_a_directory_that_holds_something_else_is_left_alone(options: Any) -> None:
    output = Path(options(MIXED).output)
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(DatasetError, match="exists and is not a prepared dataset: choose another --output"):
        prepare(options(MIXED))
    assert (output / "thesis.txt").read_text() == "mine"


def test_what_another_job_prepared_meanwhile_is_found_done_with_its_annotations(
    options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other job ends while this one waits for the lease."""
    annotations = Path(options(MIXED).output) / "annotations" / "reference"
    real = prepare_module.lease

    @contextlib.contextmanager
    def waited_for(file: Any, what: str) -> Any:
        monkeypatch.setattr(prepare_module, "lease", real)
        prepare(options(MIXED))
        annotations.mkdir(parents=True)
        with real(file, what):
            yield

    monkeypatch.setattr(prepare_module, "lease", waited_for)
    assert prepare(options(MIXED)).groups == 4
    assert annotations.exists()


def test_an_interrupted_run_leaves_nothing_under_the_name_and_the_next_one_finishes(
    options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def stop_at_the_second(group: Any, given: Any) -> list[bytes]:
        loaded.append(group.id)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return reload(group, given)

    reload = prepare_module._reload
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_reload", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(MIXED))
    output = Path(options(MIXED).output)
    assert not output.exists()
    assert (output.parent / ".out.preparing").exists()
    prepare(options(MIXED))
    assert len(open_dataset(output)) == 4
    assert sorted(path.name for path in output.parent.iterdir()) == ["in.jsonl", "media", "out"]


def test_a_picture_that_changes_meanwhile_is_noticed(options: Any, tmp_path: Path) -> None:
    class Meddler(WordCounter):
        def measure(self, group: Any) -> Any:
            (tmp_path / "media" / "a.png").write_bytes(picture(size=(41, 30)))
            return super().measure(group)

    with pytest.raises(PrepareError, match=r"'a.png' changed while it was prepared: run again"):
        prepare(options(MIXED, renderer=Meddler()))


# Refusals.


def test_too_many_bad_rows_list_them_and_prepare_nothing(options: Any) -> None:
    rows = [row(id=str(i)) for i in range(8)] + [row(chosen=""), row(rejected="")]
    with pytest.raises(PrepareError, match=r"2 of 10 rows were rejected \(0.200\), more than --max-rejected 0.05"):
        prepare(options(rows))
    output = Path(options(rows).output)
    assert [path.name for path in output.iterdir()] == ["rejected.jsonl"]
    listed = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in listed] == [(9, "'chosen' is empty"), (10, "'rejected' is empty")]
    assert prepare(options(rows, max_rejected=0.2)).groups == 8


def test_no_good_row_is_a_failure(options: Any) -> None:
    with pytest.raises(PrepareError, match="none of 1 rows became a group"):
        prepare(options([row(chosen="")], max_rejected=1.0))


def test_media_need_a_root(options: Any, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="give their root with --media"):
        prepare(options(MIXED, media=None))
    with pytest.raises(PrepareError, match="is not a directory: correct --media"):
        prepare(options(MIXED, media=str(tmp_path / "nowhere")))
    assert prepare(options([row(image=None)], media=None)).text_only == 1


def test_a_maximum_needs_a_renderer(options: Any) -> None:
    with pytest.raises(PrepareError, match="--max-tokens needs --model"):
        prepare(options(MIXED, max_tokens=5))


def test_what_is_no_dataset_is_named(options: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is not a prepared dataset: make it with launch/prepare.py"):
        open_dataset(tmp_path)
    prepare(options(MIXED))
    stamp = Path(options(MIXED).output) / "metadata.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "format_version": 0}))
    with pytest.raises(DatasetError, match="has format version 0, this program reads 1: prepare it again"):
        open_dataset(options(MIXED).output)


def test_damaged_pictures_are_noticed_on_reading(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(MIXED)
    prepare(given)
    data = open_dataset(given.output)
    other = data.group(1)
    monkeypatch.setattr(data, "group", lambda row: other)
    with pytest.raises(DatasetError, match="row 0: pictures are missing"):
        data.with_media(0)
    monkeypatch.setattr(data, "_splits", {"media": [{"encoded": [b"x", b"y"]}]})
    with pytest.raises(DatasetError, match=r"row 0: 'a.png' is damaged \(sha256\)"):
        data.with_media(0)


# The program.


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(LAUNCH), *arguments], capture_output=True, text=True, timeout=120)


def test_the_program_prepares_the_real_rewardbench(tmp_path: Path) -> None:
    data = SHARED / "data"
    if not (data / "photos").exists():
        pytest.skip("needs mm_reward_bench.jsonl and photos/ in the shared folder beside the repository")
    file = str(data / "mm_reward_bench.jsonl")
    subprocess.run([sys.executable, str(data / "make_media.py"), file, str(tmp_path / "media")], check=True)
    command = ["--source", "mm_rlhf", "--input", file, "--output", str(tmp_path / "out")]
    done = run(*command, "--media", str(tmp_path / "media"))
    assert done.returncode == 0, done.stderr
    assert "46 (K=3: 17, K=4: 26, K=5: 3)" in done.stdout
    assert "36 pictures, 10 videos (120 frames)" in done.stdout
    assert "media: 100%" in done.stderr
    again = run(*command, "--media", str(tmp_path / "media"))
    assert again.returncode == 0
    assert "is prepared already from the same inputs and options" in again.stdout
    prepared = open_dataset(tmp_path / "out")
    assert sum(len(group.pairs) for group in prepared.groups()) == 170
    assert all(prepared.with_media(row).media[0].encoded for row in range(len(prepared)))


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """The program in this process (starting one takes a second): its exit code and what it wrote to stderr."""

    def run(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", [str(LAUNCH), *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(LAUNCH), run_name="__main__")
        return left.value.code, capsys.readouterr().err

    return run


def test_failures_are_one_line_and_bad_usage_is_2(options: Any, tmp_path: Path, run_here: Any) -> None:
    base = ["--source", "mm_rlhf", "--output", str(tmp_path / "out")]
    file = options(MIXED).inputs[0]
    status, stderr = run_here(*base, "--input", str(tmp_path / "gone.jsonl"))
    assert (status, stderr.count("\n")) == (1, 1)
    assert stderr.endswith("gone.jsonl does not exist: correct --input\n")
    for arguments, message in [
        (["--map", "prompt"], "--map prompt: write TARGET=FIELD"),
        (["--max-tokens", "5"], "--max-tokens needs --model"),
        (["--max-frames", "0"], "--max-frames 0 is not positive"),
        (["--video-frames", "0"], "--video-frames 0 is not positive"),
        (["--max-rejected", "7"], "--max-rejected 7.0 is not a share between 0 and 1"),
        (["--nonsense"], "nonsense"),
    ]:
        status, stderr = run_here(*base, "--input", file, *arguments)
        assert status == 2
        assert message in stderr


def test_help_shows_every_default() -> None:
    shown = " ".join(run("--help").stdout.replace("│", " ").split())
    names = (
        "media",
        "model",
        "map",
        "margin-column",
        "sample",
        "embeddings",
        "embedding-ids",
        "clusters",
        "seed",
        "gap",
        "pairs",
        "cross-prompt",
        "max-tokens",
        "max-frames",
        "video-frames",
        "limit",
        "workers",
        "audit",
    )
    for name in names:
        assert f"--{name}" in shown
    assert shown.count("(default:") == 19


def test_a_mapped_file_is_prepared_with_its_options(options: Any) -> None:
    mapping = {"prompt": "q", "responses": "answers"}
    given = options(
        [{"q": "What?", "answers": ["only"]}], source="mapped", media=None, source_options=SourceOptions(mapping)
    )
    report = prepare(given)
    assert (report.responses, report.without_pairs) == ({1: 1}, 1)


def test_the_data_side_starts_neither_jax_nor_tensorflow_nor_torch(options: Any) -> None:
    prepare(options(MIXED))
    code = (
        "import sys, mmrlhf_jax.data.prepare, mmrlhf_jax.data.annotations\n"
        "from mmrlhf_jax.data.datasets import open_dataset\n"
        "open_dataset(sys.argv[1]).with_media(0)\n"
        "print(*{'jax', 'flax', 'tensorflow', 'torch'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, options(MIXED).output]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout == "\n"


class _ShortModel(WordCounter):
    max_positions = 12


def test_what_the_model_cannot_take_is_rejected_without_being_asked(options: Any) -> None:
    rows = [row(), row(id="long", prompt="word " * 20)]
    report = prepare(options(rows, renderer=_ShortModel(), max_rejected=1.0))
    assert report.groups == 1
    (rejected,) = report.rejected
    assert "the model's 12 positions: nothing is cut" in rejected.reason
    assert report.over_max_tokens == 1


def test_a_misnamed_picture_column_is_not_taken_for_text(options: Any) -> None:
    rows = [{**row(image=None), "img": "a.png"}]
    with pytest.raises(PrepareError, match=r"no row names a picture or video in a column that is read .*'img'"):
        prepare(options(rows))


def test_scores_that_rank_nothing_are_told(options: Any) -> None:
    scored = {"id": "q", "question": "?", "answers": ["a", "b"], "points": [2.0, 1.0]}
    mapping = {"id": "id", "prompt": "question", "responses": "answers", "score": "points"}
    changes: dict[str, Any] = {"source": "mapped", "media": None, "source_options": SourceOptions(mapping=mapping)}
    report = prepare(options([scored], **changes))
    assert (report.pairs, report.ties) == (0, 0)  # nobody said that they are equal
    assert [(note.text, note.rows) for note in report.remarks] == [
        ("scored responses without ranks: none is preferred; --gap 0 has their scores rank", 1)
    ]
    ranked = prepare(options([scored], **changes, gap=0.0, output=options([]).output + "-ranked"))
    assert (ranked.pairs, ranked.ties, ranked.remarks) == (1, 0, ())


def test_negative_margins_are_counted(options: Any) -> None:
    rows = [row(margin=1.5), row(id="r", margin=-2.0)]
    report = prepare(options(rows, source_options=SourceOptions(margin_column="margin")))
    assert (report.margins, report.negative_margins) == ((-2.0, -0.25, 1.5), 1)
    assert "margins    min -2, median -0.25, max 1.5; 1 negative, which MM-DPO takes as 0" in report.lines()

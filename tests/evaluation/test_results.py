"""OUTPUT: written whole, found again, refused for other settings; and the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_samples import row, write_rows

from mmrlhf_jax.evaluation import reward_bench
from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.results import Sheet, figures, find_done, table, write

SETTINGS = {"benchmark": "reward_bench", "model": "/m", "sampling": {"top_k": 0}, "pair": (1, 2)}


def results(**settings: object) -> dict[str, object]:
    return {"settings": {**SETTINGS, **settings}, "systems": {}, "remarks": []}


def test_what_was_written_is_found_again(tmp_path: Path):
    output = str(tmp_path / "new" / "out")
    assert find_done(output, SETTINGS) is None
    write(output, results(fingerprint="x"), [{"id": "a"}, {"id": "b"}])
    assert [json.loads(line)["id"] for line in (tmp_path / "new/out/rows.jsonl").read_text().splitlines()] == ["a", "b"]
    assert sorted(path.name for path in Path(output).iterdir()) == ["results.json", "rows.jsonl"]
    assert find_done(output, SETTINGS)["settings"]["fingerprint"] == "x"
    assert find_done(output, {**SETTINGS, "fingerprint": "x"}) is not None


def test_output_may_be_on_a_bucket(gs: str):
    assert find_done(f"{gs}/out", SETTINGS) is None
    write(f"{gs}/out", results(), [{"id": "a"}])
    assert find_done(f"{gs}/out", SETTINGS) is not None


def test_other_settings_in_the_same_place_are_refused_by_name(tmp_path: Path):
    write(str(tmp_path), results(), [])
    with pytest.raises(BenchmarkError, match=r"holds the results of other settings(.|\n)*model: there '/m', now '/n'$"):
        find_done(str(tmp_path), {**SETTINGS, "model": "/n"})
    with pytest.raises(BenchmarkError, match="fingerprint: there None, now 'y'"):
        find_done(str(tmp_path), {**SETTINGS, "fingerprint": "y"})


def test_rows_without_results_are_an_interrupted_run(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("half")
    assert find_done(str(tmp_path), SETTINGS) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"other": 1}'])
def test_a_strange_results_file_is_not_overwritten(tmp_path: Path, text: str):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(BenchmarkError, match="is not an evaluation's: choose another --output"):
        find_done(str(tmp_path), SETTINGS)


def test_output_must_be_a_directory(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="is not a directory"):
        find_done(str(tmp_path / "file"), SETTINGS)


def test_the_table(tmp_path: Path):
    file = write_rows(
        tmp_path / "b.jsonl", [row(image="mcq/1.png", chosen="yes", rejected="no"), row(image="mcq/1.png")]
    )
    rows = reward_bench.read(file, lambda encoded: None)
    systems = figures(reward_bench.BENCHMARK, rows, np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert list(systems) == ["model", "longer answer", "random"]
    assert list(figures(reward_bench.BENCHMARK, rows, None)) == ["longer answer", "random"]
    lines = table(reward_bench.BENCHMARK, systems, ["a remark\x1b[31m"])
    assert lines[0].split() == ["MM-RLHF-RewardBench", "pairs", "groups", "model", "longer", "answer", "random"]
    assert lines[1].split() == ["ACC", "ACC+"] * 3
    assert lines[2].split() == ["mcq", "2", "1", "0.500", "0.000", "1.000", "1.000", "0.500", "0.250"]
    assert lines[3].split() == ["long", "0", "0", "-", "-", "-", "-", "-", "-"]
    assert lines[-1] == "note: a remark[31m"
    assert len({len(line) for line in lines[1:-1]}) == 1


def test_names_of_sections_from_a_file_are_fit_for_a_terminal():
    lines = table(Sheet("T", ("rows",), {"acc": "ACC"}), {"model": {"a\x1b[31m\nb" + "c" * 99: {"rows": 1}}}, [])
    assert lines[2].startswith("a[31m b" + "c" * 53 + " ")

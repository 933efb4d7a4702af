"""The data benchmark walks the pipeline of training over photographs it made, and its figures belong together."""

from __future__ import annotations

import io
import json
import multiprocessing

import numpy as np
import pytest
from tiny import write_tiny_directory

from mmrlhf_jax.benchmarks import data as benchmark
from mmrlhf_jax.benchmarks.data import PARTS, Data, Rate, set_up, time_data
from mmrlhf_jax.benchmarks.photos import QUALITY, photo
from mmrlhf_jax.command import UsageError

SMALL = {"size": (96, 64), "words": 10, "seconds": 0.2, "repeats": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_directory(directory)
    return str(directory)


def test_a_photo_costs_a_decoder_what_photographs_do():
    written = io.BytesIO()
    photo(np.random.default_rng(0), 640, 480).save(written, "JPEG", quality=QUALITY)
    assert 120_000 < len(written.getvalue()) < 180_000


def test_the_figures_belong_together(tiny, tmp_path, capsys):
    output = tmp_path / "figures.json"
    time_data(Data(workers=(0, 1), pictures=6, model=tiny, output=str(output), **SMALL))
    figures = json.loads(output.read_text())
    assert figures["command"]["pictures"] == 6
    assert figures["machine"]["cores"] >= 1
    parts = figures["seconds_a_picture"]
    assert set(parts) == {*PARTS, "all"}
    assert min(parts.values()) > 0
    assert max(parts[part] for part in PARTS) < parts["all"]
    threads, one = figures["rates"]
    for row in (threads, one):
        assert len(row["pictures"]) == 1
        assert min(row["pictures"]) > 0
        assert row["range"] == [row["pictures_per_second"]] * 2
        assert row["per_worker"] == row["pictures_per_second"]
    assert (threads["scaling"], one["scaling"]) == (None, 1.0)
    assert not multiprocessing.active_children()  # none is left beside the next measurement
    printed = capsys.readouterr().out
    assert "ms a picture: read " in printed
    assert f"1 workers: {one['pictures_per_second']:6.1f} pictures/s" in printed


def test_without_a_model_the_geometry_is_that_of_llava_onevision(tmp_path):
    data, renderer = set_up(Data(workers=(0,), pictures=2, seconds=0.1), tmp_path)
    (first, *_) = data.plan.micro_batches
    batch = data.loader(first)
    assert renderer.tile_size == 384
    assert len(renderer.config.pinpoints) == 36
    assert batch.tiles.shape[1:] == (5, 384, 384, 3)  # 640 x 480: the whole, and 2 x 2
    assert sorted(batch.row) == [0, 1]
    assert batch.response_mask.sum() == 8


def test_scaling_is_the_share_of_linear():
    rates = {0: [Rate(40, 1.0, 2.0)], 1: [Rate(30, 1.0, 1.5)], 2: [Rate(90, 2.0, None), Rate(40, 1.0, None)]}
    rows = {row["workers"]: row for row in benchmark._rows(rates)}
    assert rows[2]["pictures_per_second"] == 42.5
    assert rows[2]["range"] == (40, 45)
    assert rows[2]["per_worker"] == 21.25
    assert rows[2]["scaling"] == pytest.approx(21.25 / 30)
    assert rows[2]["per_core_second"] is None
    assert rows[0]["per_core_second"] == 20
    assert rows[0]["scaling"] is None


def test_a_figure_taken_beside_other_work_says_so():
    quiet, loud = (benchmark._rows({1: [Rate(30, 1.0, 1.0, others)]})[0] for others in (0.05, 0.8))
    assert loud["others"] == 0.8
    assert benchmark._line(loud).endswith("BESIDE OTHER WORK ON 0.8 CORES")
    assert "BESIDE" not in benchmark._line(quiet)


@pytest.mark.parametrize(
    "wrong", [{"workers": ()}, {"workers": (-1,)}, {"pictures": 0}, {"repeats": 0}, {"responses": 1}]
)
def test_a_command_that_would_measure_nothing_is_refused(wrong):
    with pytest.raises(UsageError, match=r"--workers are numbers from 0 on|--responses at least 2"):
        time_data(Data(**wrong))

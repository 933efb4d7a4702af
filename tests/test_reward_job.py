"""The reward model's job on real annotations, through the programs a user calls: prepare, train a critique reward
model, score every response, train MM-DPO on the margins, and the benchmark."""

import json
import subprocess
import sys

import numpy as np
import pytest
from data_samples import SHARED
from small_world import ROOT, metrics, run
from tiny import TINY

from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.rewards import read_rewards
from mmrlhf_jax.models.llava_onevision import weights

pytestmark = pytest.mark.slow
ANNOTATIONS = SHARED / "data" / "mm_reward_bench.jsonl"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    if not ANNOTATIONS.exists():
        pytest.skip("the real annotations are not beside this checkout")
    home = tmp_path_factory.mktemp("reward-job")
    maker = SHARED / "data" / "make_media.py"
    subprocess.run([sys.executable, maker, ANNOTATIONS, home / "media"], check=True)
    texts = [json.loads(line)["chosen_reason"] for line in ANNOTATIONS.read_text().splitlines()]
    weights.new_directory(home / "model", TINY, texts=texts, vocab=1024)
    model, data = ("--model", home / "model"), ("--dataset", home / "data")
    run("prepare", "--source", "mm_rlhf", "--input", ANNOTATIONS, "--media", home / "media", "--output", home / "data",
        *model)  # fmt: skip
    run("train", ROOT / "configs" / "tiny_reward.py", *model, *data, "--output", home / "judge", "--data.max-steps", 3,
        "--data.max-buckets", 2)  # fmt: skip
    scored = (*data, "--model", home / "judge", "--with", "reward", "--dtype", "float32", "--max-buckets", 2)
    run("annotate", *scored, "--max-new-tokens", 8, "--decode.max-buckets", 2)
    run("annotate", *scored, "--critiques", "none")
    return home


def stored(home, critiques):
    store = next(store for store in find(str(home / "data"), "reward") if store.key["critiques"] == critiques)
    return store, read_rewards(store, open_dataset(str(home / "data")))


def test_every_response_of_the_real_annotations_has_a_critique_and_a_score(job):
    _, rewards = stored(job, "generated")
    groups = list(open_dataset(str(job / "data")).groups())
    assert rewards.keys() == set(range(46))
    for row, group in enumerate(groups):
        assert rewards[row].scores.shape == (len(group.responses), 1)
        assert np.isfinite(rewards[row].scores).all()
    assert sum(bool(text) for reward in rewards.values() for (text,) in reward.critiques) > 150


def test_critiques_are_learned_from_the_annotators(job):
    first, *_, last = metrics(job / "judge")
    assert last["loss/critique"] < first["loss/critique"]
    assert sum(len(record["rows"]) for record in metrics(job / "judge")) == 24


def test_mm_dpo_trains_on_the_margins_of_the_reward_model(job):
    store, rewards = stored(job, "generated")
    run("train", ROOT / "configs" / "quickstart" / "mm_dpo.py", "--model", job / "model", "--dataset", job / "data",
        "--reference", "online", "--margins", store.directory.name, "--output", job / "policy", "--data.max-steps", 1,
        "--data.groups-per-step", 12, "--data.multiple", 128, "--data.max-buckets", 2)  # fmt: skip
    (step,) = metrics(job / "policy")
    groups = list(open_dataset(str(job / "data")).groups())
    margins = [
        rewards[row].score[pair.chosen] - rewards[row].score[pair.rejected]
        for row in step["rows"]
        for pair in groups[row].pairs
    ]
    assert len(set(step["rows"])) == 12
    assert len(margins) > 24
    assert step["margin/mean"] == pytest.approx(np.mean(margins), rel=1e-4, abs=1e-6)
    assert 0.1 <= step["beta/mean"] <= 0.15


def test_the_benchmark_counts_what_annotate_stored(job):
    said = run("evaluate", "reward_bench", "--model", job / "judge", "--input", ANNOTATIONS, "--media", job / "media",
               "--output", job / "bench", "--critiques", "none", "--dtype", "float32")  # fmt: skip
    _, rewards = stored(job, "none")
    groups = list(open_dataset(str(job / "data")).groups())
    right = [
        [rewards[row].score[pair.chosen] > rewards[row].score[pair.rejected] for pair in group.pairs]
        for row, group in enumerate(groups)
    ]
    figures = json.loads((job / "bench" / "results.json").read_text())["systems"]
    overall = {name: system["overall"] for name, system in figures.items()}
    assert overall["model"]["acc"] == pytest.approx(np.mean([one for each in right for one in each]))
    assert overall["model"]["acc_plus"] == pytest.approx(np.mean([all(each) for each in right]))
    assert [round(overall["longer answer"][name], 3) for name in ("acc", "acc_plus")] == [0.718, 0.478]
    assert [round(overall["random"][name], 3) for name in ("acc", "acc_plus")] == [0.5, 0.188]
    assert "overall" in said

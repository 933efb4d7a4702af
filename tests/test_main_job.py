"""The main job on real annotations, through the programs a user calls: prepare, annotate, train, export,
transformers."""

import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from data_samples import SHARED
from PIL import Image
from small_world import ROOT, metrics, run
from tiny import TINY

from mmrlhf_jax.batch import Entry, Totals, pack
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.media import decode
from mmrlhf_jax.data.ranking import pairs_of
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision import weights
from mmrlhf_jax.models.llava_onevision.config import read_config
from mmrlhf_jax.models.llava_onevision.model import Compute, declare, response_logps
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

pytestmark = [pytest.mark.slow, pytest.mark.parity]
ANNOTATIONS = SHARED / "data" / "mm_reward_bench.jsonl"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    if not ANNOTATIONS.exists():
        pytest.skip("the real annotations are not beside this checkout")
    pytest.importorskip("torch")
    home = tmp_path_factory.mktemp("main-job")
    maker = SHARED / "data" / "make_media.py"
    subprocess.run([sys.executable, maker, ANNOTATIONS, home / "media"], check=True)
    texts = [json.loads(line)["chosen"] for line in ANNOTATIONS.read_text().splitlines()]
    weights.new_directory(home / "model", TINY, texts=texts, vocab=1024)
    data, model = ("--dataset", home / "data"), ("--model", home / "model")
    report = run("prepare", "--source", "mm_rlhf", "--input", ANNOTATIONS, "--media", home / "media",
                 "--output", home / "data", *model)  # fmt: skip
    run("annotate", *data, *model, "--with", "reference", "--dtype", "float32")
    run("train", ROOT / "configs" / "tiny.py", *model, *data, "--output", home / "run", "--data.epochs", 1)
    run("export", home / "run", "--output", home / "aligned", "--dtype", "float32")
    return home, report


def test_46_groups_are_found_and_their_rankings_give_back_the_170_pairs(job):
    home, report = job
    assert "groups     46" in report
    assert "pairs      170" in report
    rows = [json.loads(line) for line in ANNOTATIONS.read_text().splitlines()]
    given = sorted((row["id"], row["chosen"], row["rejected"]) for row in rows)
    found = sorted(
        (group.id, group.responses[i].text, group.responses[j].text)
        for group in open_dataset(str(home / "data")).groups()
        for i, j in pairs_of([response.rank for response in group.responses])
    )
    assert found == given
    assert len(found) == 170


def test_every_group_was_trained_on_once(job):
    home, _ = job
    records = metrics(home / "run")
    assert sorted(row for record in records for row in record["rows"]) == list(range(46))
    assert records[0]["loss/preference"] == pytest.approx(np.log(2), abs=1e-4)


def test_transformers_loads_the_export_with_logits_equal_to_ours(job):
    import torch
    from torchvision_shim import mend_torchvision

    mend_torchvision()
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    home, _ = job
    directory = str(home / "aligned")
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(directory)
    processor.image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory)
    config, renderer = read_config(directory), load_renderer(directory)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    ours = weights.load_params(directory, declare(config), config, mesh, ShardingRules())
    score = jax.jit(lambda params, batch: response_logps(params, config, batch, Compute()).logp)
    dataset = open_dataset(str(home / "data"))
    pictured = [row for row, g in enumerate(dataset.groups()) if [m.kind for m in g.media] == ["image"]]
    compared = 0
    for row in pictured[:6]:
        group = dataset.with_media(row)
        rendered = renderer.render(group, decode)
        k = len(group.responses)
        none = np.zeros((k, k), np.float32)
        entry = Entry(row, rendered, none, none, np.zeros(k, np.int32), np.zeros(k, np.float32))
        batch = pack(
            [entry], Bucket(1, 37, 384, 2944), Totals(1, 1, 1, 1), responses=5, tokens_per_tile=9, tile_size=42
        )
        logps = np.asarray(score(ours, batch))[0]
        image = Image.open(io.BytesIO(group.media[0].encoded[0])).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": group.prompt[0].text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompt = processor(text=text, images=image, return_tensors="pt")
        at = 0
        for branch in rendered.branches:
            answer = torch.tensor(branch.token[None]).long()
            ids = torch.cat([prompt["input_ids"], answer], 1)
            with torch.no_grad():
                logits = theirs(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=prompt["pixel_values"],
                    image_sizes=prompt["image_sizes"],
                ).logits[0, prompt["input_ids"].shape[1] - 1 : -1]
            wanted = torch.log_softmax(logits.double(), -1).gather(-1, answer[0, :, None])[:, 0].numpy()
            np.testing.assert_allclose(logps[at : at + len(wanted)], wanted, atol=1e-4)
            at += len(wanted)
            compared += len(wanted)
    assert compared > 500

"""Law 4, reward models: the released layout loads and scores as an independent torch computation; ours come back as
they were saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from small_world import run
from tiny import TINY
from tiny_reward import write_released, write_reward_model
from torchvision_shim import mend_torchvision

from mmrlhf_jax.data.media import decode
from mmrlhf_jax.groups import Group, Media, Origin, Response, Turn
from mmrlhf_jax.inference.reward import RewardModel, Scoring, score_groups
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.models import families, key_table
from mmrlhf_jax.models.critique_reward import render
from mmrlhf_jax.models.critique_reward.config import RewardSettings, fill, read_template, template_sha256
from mmrlhf_jax.models.critique_reward.model import declare
from mmrlhf_jax.models.critique_reward.render import load_reward_renderer
from mmrlhf_jax.models.critique_reward.weights import KEYS
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.lmms_lab import SYSTEM
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.names import canonical
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import check_family, load_model
from mmrlhf_jax.training.recipe import INFERENCE

LISTING = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracles" / "keys" / "mm-rlhf-reward-7b.json"
TOLERANCE = 1e-4


def picture(width: int, height: int, seed: int) -> Media:
    import io

    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return Media("image", f"{seed}.png", ((width, height),), encoded=(file.getvalue(),))


def video(frames: int) -> Media:
    pictures = [picture(42, 42, seed) for seed in range(frames)]
    return Media("video", "v", ((42, 42),) * frames, encoded=tuple(p.encoded[0] for p in pictures))


def group(*media: Media) -> Group:
    responses = (
        Response("Two cats.", reason="It is right: two cats sit there."),
        Response("Two dogs and a lamp.", 1, reason="They are cats."),
        Response("I can not say.", 2, reason="It could."),
    )
    return Group("q", (Turn("user", "How many cats?"),), media, responses, (), (Origin("made.jsonl", 1),))


GROUPS = {
    "any-res": group(picture(190, 100, 0)),
    "tall": group(picture(20, 300, 1)),
    "two pictures": group(picture(30, 90, 2), picture(91, 30, 3)),
    "video": group(video(4)),
    "text": group(),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released") / "model")


@pytest.fixture
def template(tmp_path, monkeypatch):
    """A template file that passes for the released one."""
    text = "Judge.\n\n[Question]: {question}\n[LMM Response]: {answer}\n\n[Evaluation]:"
    monkeypatch.setattr(render, "RELEASED_SHA256", template_sha256(text))
    (tmp_path / "template.txt").write_text(text)
    return str(tmp_path / "template.txt")


def judge(directory: Path, template: str = "") -> RewardModel:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = check_family(
        load_model(str(directory), mesh, ShardingRules(), rates=INFERENCE), str(directory), reward=True
    )
    return RewardModel(model, load_reward_renderer(str(model.assets), template=template), mesh, Compute())


# --- torch ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_score(released):
    """(group, answer, critique or ids of one, template) -> the score, with transformers' policy and a head in torch."""
    torch = pytest.importorskip("torch")
    mend_torchvision()
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    twin = released.with_name(f"{released.name}-twin")
    policy = LlavaOnevisionForConditionalGeneration.from_pretrained(twin, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(twin)
    processor.image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(twin)
    head = {name: torch.from_numpy(tensor) for name, tensor in load_file(released / "model.safetensors").items()}

    def score(group: Group, answer: str, critique: str | tuple[int, ...] | None, template: str) -> float:
        marks = "".join(f"<{media.kind}>\n" for media in group.media)
        asked = fill(Path(template).read_text(), group.prompt[0].text, answer)
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{marks}{asked}<|im_end|>\n"
        text += "<|im_start|>assistant\n" + (f"{critique}<|im_end|>\n" if isinstance(critique, str) else "")
        images = [Image.fromarray(decode(m.encoded[0])) for m in group.media if m.kind == "image"]
        frames = [[decode(data) for data in m.encoded] for m in group.media if m.kind == "video"]
        pixels = {"images": [images]} if images else {"videos": [np.stack(f) for f in frames]} if frames else {}
        inputs = processor(text=text, return_tensors="pt", **pixels)
        if isinstance(critique, tuple):
            closing = processor.tokenizer("<|im_end|>\n")["input_ids"]
            more = torch.tensor([[*critique, *closing]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            hidden = policy.model(**inputs).last_hidden_state[0, -1]
            inner = torch.tanh(head["rm_head.dense.weight"] @ hidden + head["rm_head.dense.bias"])
            return float(head["rm_head.out_proj.weight"] @ inner + head["rm_head.out_proj.bias"])

    return score


@pytest.mark.parity
@pytest.mark.parametrize("critiques", ["human", "none"])
@pytest.mark.parametrize("kind", GROUPS)
def test_the_released_layout_scores_as_torch_does(released, template, torch_score, kind, critiques):
    asked = GROUPS[kind]
    (found,) = score_groups([asked], judge(released, template), Scoring(critiques))
    reasons = [response.reason if critiques == "human" else None for response in asked.responses]
    wanted = [torch_score(asked, r.text, reason, template) for r, reason in zip(asked.responses, reasons, strict=True)]
    assert np.ptp(wanted) > 100 * TOLERANCE  # answers differ, so it matters which one is read
    np.testing.assert_allclose(found.score, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parity
def test_the_score_behind_a_critique_of_its_own_is_torch_s(released, template, torch_score):
    """Read from the decoding cache; torch encodes prompt and critique once more."""
    asked, scorer = GROUPS["any-res"], judge(released, template)
    scoring = Scoring("generated", 2, SamplingConfig(max_new_tokens=12, temperature=1.0))
    (found,) = score_groups([asked], scorer, scoring)
    tokenizer = scorer.renderer.policy.tokenizer
    for k, response in enumerate(asked.responses):
        assert found.critiques[k][0] != found.critiques[k][1]
        for n, critique in enumerate(found.critiques[k]):
            ids = tuple(tokenizer(critique, add_special_tokens=False)["input_ids"])
            if tokenizer.decode(ids) != critique or "\ufffd" in critique:
                continue  # bytes that are no text do not come back
            wanted = torch_score(asked, response.text, ids, template)
            np.testing.assert_allclose(found.scores[k, n], wanted, rtol=0, atol=TOLERANCE)


# --- layouts --------------------------------------------------------------------------------------------------------


def test_the_released_names_map_with_nothing_missing_or_surplus():
    if not LISTING.exists():
        pytest.skip("the hub's key listings lie in the shared folder beside the repository, which is not here")
    tensors = json.loads(LISTING.read_text())["tensors"]
    vocab = tensors["lm_head.weight"][0]
    policy = LlavaOnevisionConfig()
    policy = dataclasses.replace(policy, decoder=dataclasses.replace(policy.decoder, vocab=vocab))
    source = SimpleNamespace(
        directory="released",
        where={canonical(name): name for name in tensors},
        shape=lambda name: tuple(tensors[source.where[name]]),
    )
    expected = key_table.expected_tensors(declare(families.reward_config(policy, "tanh")), KEYS)
    key_table.check(source, expected, lambda name: False)
    assert {item.name for item in expected} == set(source.where)


def test_a_released_model_says_what_it_lacks_and_is_no_policy(released):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = load_model(str(released), mesh, ShardingRules(), rates=INFERENCE)
    with pytest.raises(ValueError, match="write it to a file and name that"):
        load_reward_renderer(str(model.assets))
    with pytest.raises(ValueError, match=r"a reward model .*; a policy is asked for here"):
        check_family(model, str(released), reward=False)


def test_a_released_model_is_its_exported_twin(released, template, tmp_path):
    run("export", released, "--output", tmp_path / "ours", "--dtype", "float32")
    with_file = judge(released, template)
    ours = judge(tmp_path / "ours", template)
    for (name, have), (_, want) in zip(
        named_leaves(ours.model.params), named_leaves(with_file.model.params), strict=True
    ):
        np.testing.assert_array_equal(have, want, err_msg=name)
    assert ours.renderer.fingerprint == with_file.renderer.fingerprint
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() >= {
        "rm_head.dense.weight",
        "rm_head.out_proj.bias",
    }


@pytest.mark.parametrize(
    "settings",
    [RewardSettings("linear", True, read_template("")), RewardSettings("tanh", True, read_template("")),
     RewardSettings("linear", False)],
    ids=["linear", "tanh", "scalar"],
)  # fmt: skip
def test_a_reward_model_comes_back_as_it_was_saved(tmp_path, settings):
    first = judge(write_reward_model(tmp_path / "first", settings))
    run("export", tmp_path / "first", "--output", tmp_path / "second", "--dtype", "float32")
    second = judge(tmp_path / "second")
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()
    assert first.model.config == second.model.config == families.reward_config(TINY, settings.head)
    assert second.renderer.fingerprint == first.renderer.fingerprint

"""LoRA: adapters alone train, they can be switched off, merged and handed to others."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_world import ROOT, metrics, run
from tiny import TINY, random_params

from mmrlhf_jax.models.llava_onevision.adapter import CONFIG, WEIGHTS, read_adapter_config, save_adapter
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.nn import lora
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.model import load_adapters, load_model
from mmrlhf_jax.training.recipe import INFERENCE, LoraConfig, read_recipe
from mmrlhf_jax.training.run import Checkpoints
from mmrlhf_jax.training.train import train

RANK = 4


def recipe(world, **changes):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    fields = {
        "objective": DPO(gamma=0.25),
        "model": world.model,
        "dataset": world.dataset,
        "reference": "lora_off",
        "lora": LoraConfig(rank=RANK, alpha=8.0),
        "data": dataclasses.replace(tiny.data, max_steps=3, max_buckets=1),
        "optimizer": dataclasses.replace(tiny.optimizer, learning_rate=1e-2, warmup=0.0, schedule="constant"),
    }
    return dataclasses.replace(tiny, **{**fields, **changes})


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def lora_run(small_world):
    output = small_world.directory / "lora-run"
    train(recipe(small_world), output)
    return output


def test_an_adapted_kernel_multiplies_as_its_merged_twin():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    for pattern, x, base, a, b in (
        ("btd,dnh->btnh", draw(2, 3, 8), draw(8, 2, 5), draw(8, RANK), draw(RANK, 2, 5)),
        ("btnh,nhd->btd", draw(2, 3, 2, 5), draw(2, 5, 8), draw(2, 5, RANK), draw(RANK, 8)),
        ("btd,df->btf", draw(2, 3, 8), draw(8, 6), draw(8, RANK), draw(RANK, 6)),
    ):
        kernel = lora.Adapted(base, a, b, 0.5)
        merged = base + 0.5 * jnp.tensordot(a, b, axes=1)
        np.testing.assert_allclose(
            lora.project(pattern, x, kernel), jnp.einsum(pattern, x, merged), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_array_equal(lora.project(pattern, x, base), jnp.einsum(pattern, x, base))


def test_stacked_kernels_merge_layer_by_layer():
    mesh = one_device()
    declared = declare(TINY)
    params = jax.device_put(random_params(), jax.devices()[0])
    adapted = lora.adapt(
        params, declared, mesh, ShardingRules(), targets=("decoder.layers.out_kernel",), rank=2, alpha=4.0, seed=0
    )
    kernel = adapted.decoder.layers.out_kernel
    kernel = kernel.replace(b=jnp.ones_like(kernel.b))
    adapted = adapted.replace(decoder=adapted.decoder.replace(layers=adapted.decoder.layers.replace(out_kernel=kernel)))
    merged = lora.merge(adapted).decoder.layers.out_kernel
    for layer in range(TINY.decoder.layers):
        wanted = kernel.base[layer] + 2.0 * jnp.einsum("nhr,rd->nhd", kernel.a[layer], kernel.b[layer])
        np.testing.assert_allclose(merged[layer], wanted, rtol=1e-5, atol=1e-5)


def test_fresh_adapters_change_nothing_so_lora_off_is_the_reference(small_world, lora_run):
    first = metrics(lora_run)[0]
    assert first["loss/preference"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_lora_off_is_the_online_reference(small_world, lora_run):
    """The same three steps against a frozen copy of the starting model."""
    output = small_world.directory / "lora-online"
    train(recipe(small_world, reference="online"), output)
    for off, online in zip(metrics(lora_run), metrics(output), strict=True):
        for name in ("loss", "rewards/margins", "grad_norm"):
            assert off[name] == pytest.approx(online[name], rel=1e-5, abs=1e-7), name
    assert metrics(lora_run)[-1]["rewards/margins"] != 0.0


def test_only_adapters_are_trained_and_stored(small_world, lora_run):
    checkpoints = Checkpoints(lora_run / "checkpoints")
    names = checkpoints.position(3)["dtypes"]
    assert all(lora.is_adapter(name) for name in names)
    assert len(names) == 2 * (7 + 2)  # seven kernels of a decoder layer, two of the projector
    checkpoints.close()
    adapted = load_adapters(str(lora_run), one_device(), ShardingRules()).params
    start = dict(named_leaves(load_model(small_world.model, one_device(), ShardingRules(), rates=INFERENCE).params))
    for name, leaf in named_leaves(lora.strip(adapted)):
        np.testing.assert_array_equal(leaf, start[name], err_msg=name)


def test_the_merged_export_is_base_plus_update(small_world, lora_run):
    run("export", lora_run, "--output", lora_run / "merged", "--dtype", "float32")
    run("export", lora_run, "--output", lora_run / "adapter", "--adapter")
    before = load_file(small_world.directory / "model" / "model.safetensors")
    after = load_file(lora_run / "merged" / "model.safetensors")
    adapter = load_file(lora_run / "adapter" / WEIGHTS)
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    at = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    update = adapter[f"{at}.lora_B.weight"] @ adapter[f"{at}.lora_A.weight"] * (8.0 / RANK)
    np.testing.assert_allclose(after[name], before[name] + update, atol=1e-6)
    assert np.abs(update).max() > 1e-4
    for untouched in ("image_newline", "language_model.model.embed_tokens.weight"):
        np.testing.assert_array_equal(after[untouched], before[untouched])
    assert read_adapter_config(str(lora_run / "adapter")).scale == 8.0 / RANK


def test_an_adapter_directory_is_a_model(small_world, lora_run, tmp_path):
    """What was exported as an adapter, and loaded again over its base, is the run's merged model."""
    run("export", lora_run, "--output", tmp_path / "adapter", "--adapter")
    run("export", tmp_path / "adapter", "--output", tmp_path / "merged", "--dtype", "float32")
    run("export", lora_run, "--output", tmp_path / "straight", "--dtype", "float32")
    again, straight = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "straight"))
    for name, weight in straight.items():
        np.testing.assert_array_equal(again[name], weight, err_msg=name)


def test_a_killed_lora_run_goes_on_to_the_same_end(small_world, lora_run, tmp_path):
    """Resumed from its second step's checkpoint: the base comes from the model, the adapters from the run."""
    train(recipe(small_world), tmp_path / "run")
    (tmp_path / "run" / "complete.json").unlink()
    for file in (tmp_path / "run" / "checkpoints" / "3").rglob("*"):
        if file.is_file():
            file.unlink()
    for directory in sorted((tmp_path / "run" / "checkpoints" / "3").rglob("*"), reverse=True):
        directory.rmdir()
    (tmp_path / "run" / "checkpoints" / "3").rmdir()
    train(recipe(small_world), tmp_path / "run")
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3]
    wanted, got = (
        dict(named_leaves(load_adapters(str(path), one_device(), ShardingRules()).params))
        for path in (lora_run, tmp_path / "run")
    )
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("decoder.layers.qurey_kernel",), "matches no parameter; kernels are .*decoder.layers.query_kernel"),
        (("decoder.embedding",), "matches decoder.embedding, which is no kernel"),
        (("*_kernel",), r"matches tower\..*_kernel: adapters are for decoder\.layers\. and projector\."),
        (("decoder.layers.query_bias",), "matches decoder.layers.query_bias, which is no kernel"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(small_world, tmp_path, targets, message):
    with pytest.raises(ValueError, match=message):
        train(recipe(small_world, lora=LoraConfig(rank=2, targets=targets)), tmp_path / "run")


def test_an_adapter_that_is_more_than_a_low_rank_update_is_refused_by_name(lora_run, tmp_path):
    run("export", lora_run, "--output", tmp_path / "adapter", "--adapter")
    raw = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**raw, "use_dora": True, "bias": "all"}))
    with pytest.raises(ValueError, match=r"only plain LoRA adapters are served; not so here: use_dora = True, bias"):
        read_adapter_config(str(tmp_path / "adapter"))


def test_an_adapter_appears_only_when_whole(lora_run, tmp_path, monkeypatch):
    """Killed before its last act there is nothing under its name; run again, nothing beside it. Run once more, after a
    kill at the very end, it is there already."""
    params, output = load_adapters(str(lora_run), one_device(), ShardingRules()).params, tmp_path / "adapter"

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", die)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(params, str(output), base="owner/base")
    assert not output.exists()
    assert save_adapter(params, str(output), base="owner/base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {path.name for path in output.iterdir()} == {CONFIG, WEIGHTS}
    assert not save_adapter(params, str(output), base="owner/base")
    with pytest.raises(FileExistsError, match=r"adapter exists already; name another --output or remove it"):
        save_adapter(params, str(output), base="owner/another")
    (output / CONFIG).unlink()
    with pytest.raises(FileExistsError, match=r"adapter exists already \(without adapter_config.json"):
        save_adapter(params, str(output), base="owner/base")


def test_a_run_without_adapters_has_none_to_export(small_world, tmp_path):
    with pytest.raises(AssertionError, match="has no adapter: it is no LoRA run"):
        run("export", small_world.model, "--output", tmp_path / "adapter", "--adapter")


def test_lora_off_needs_lora(small_world):
    with pytest.raises(ValueError, match=r"reference = .lora_off. needs adapters to switch off: set lora.rank"):
        recipe(small_world, lora=LoraConfig())

"""Law 4, memory: large parameters are loaded tensor by tensor, and are the same to the last bit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_world import free_port
from tiny import TINY, random_params, write_tiny_directory

from mmrlhf_jax.models import key_table
from mmrlhf_jax.models.key_table import Key
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.llava_onevision.weights import load_params, save_directory
from mmrlhf_jax.nn.params import map_params, named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

TESTS = Path(__file__).resolve().parents[1]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    write_tiny_directory(path / "assets")
    params = random_params()
    params.newline[:3] = 1e-7, -3e-8, 65504  # subnormal and largest of fp16
    for dtype in DTYPES:
        save_directory(params, path / "assets", path / dtype, dtype)
    return {dtype: path / dtype for dtype in DTYPES}


def load(directory: Path, dtype: str, mesh: MeshConfig, rules: ShardingRules = ShardingRules()):  # noqa: B008
    def kept(param):
        return param.__class__(**{**vars(param), "dtype": jnp.dtype(dtype)})

    devices = jax.devices()[: math.prod((mesh.data, mesh.fsdp, mesh.tensor))]
    return load_params(directory, map_params(kept, declare(TINY)), TINY, make_mesh(mesh, devices), rules)


@pytest.mark.parametrize(
    ("stored", "wanted", "mesh"),
    [
        ("float32", "float32", MeshConfig(1, 1, 1)),
        ("float32", "bfloat16", MeshConfig(2, 2, 2)),
        ("float16", "float32", MeshConfig(2, 2, 2)),
        ("bfloat16", "float32", MeshConfig(1, 4, 2)),
    ],
)
def test_tensor_by_tensor_is_all_at_once_bit_for_bit(models, monkeypatch, stored, wanted, mesh):
    at_once = load(models[stored], wanted, mesh)
    monkeypatch.setattr(key_table, "HELD_BYTES", -1)
    lean = load(models[stored], wanted, mesh)
    for (name, have), (_, want) in zip(named_leaves(lean), named_leaves(at_once), strict=True):
        assert have.dtype == want.dtype == wanted
        assert have.sharding.is_equivalent_to(want.sharding, have.ndim), name
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (have, want)), err_msg=name)


def test_stacks_whose_layers_are_split_load_too(models, monkeypatch):
    monkeypatch.setattr(key_table, "HELD_BYTES", -1)
    rules = ShardingRules(layers="tensor", vocab=None, heads=None, kv_heads=None, mlp=None)
    rules = ShardingRules(**{**vars(rules), "tower_heads": None, "tower_mlp": None})
    params = load(models["float32"], "float32", MeshConfig(1, 2, 2), rules)
    assert params.decoder.layers.up_kernel.sharding.spec[0] == "tensor"
    np.testing.assert_array_equal(params.decoder.layers.up_kernel, random_params().decoder.layers.up_kernel)


def test_no_program_of_a_load_communicates(models, monkeypatch):
    monkeypatch.setattr(key_table, "HELD_BYTES", -1)
    params = load(models["float32"], "float32", MeshConfig(2, 2, 2))
    for name, stack in named_leaves(params.decoder.layers):
        layer = jax.device_put(
            stack[0], jax.NamedSharding(stack.sharding.mesh, P(*stack.sharding.spec[1:]))
        )  # as _place makes it
        write = jax.jit(key_table._write_layer, donate_argnums=0, out_shardings=stack.sharding)
        text = write.lower(stack, layer, 1).compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-reduce", "collective", "all-to-all")), name


@pytest.mark.parametrize(
    ("pattern", "shape", "index", "rows"),
    [
        ("", (6, 4), (slice(2, 4), slice(None)), slice(2, 4)),
        ("", (6,), (slice(None),), slice(0, 6)),
        ("d f -> f d", (8, 6), (slice(0, 4), slice(3, 6)), slice(3, 6)),
        ("(n h) d -> d n h", (6, 4, 5), (slice(0, 3), slice(1, 3), slice(None)), slice(5, 15)),
        ("(n h) d -> d n h", (6, 4, 5), (slice(0, 3), slice(1, 3), slice(2, 3)), slice(7, 13)),
        ("d (n h) -> n h d", (4, 5, 6), (slice(0, 1), slice(None), slice(2, 4)), slice(2, 4)),
    ],
)
def test_only_the_rows_a_part_needs_are_asked_for(pattern, shape, index, rows):
    key = Key("ours", "theirs", pattern)
    assert key.rows(index, shape) == rows
    theirs = key.their_shape(shape)
    numbers = np.broadcast_to(np.arange(theirs[0]).reshape(-1, *[1] * (len(theirs) - 1)), theirs)
    needed = key.import_array(numbers, shape)[index]
    assert (needed.min(), needed.max()) == (rows.start, rows.stop - 1)


# --- two processes, and memory: in processes of their own ---------------------------------------------------------


def run(code: str, *arguments: str, devices: int) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=env)


TWO = """
import sys, jax, numpy as np, socket
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]))
from mmrlhf_jax.models import key_table
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.llava_onevision.weights import load_params
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from tiny import TINY, random_params
key_table.HELD_BYTES = -1
params = load_params(sys.argv[1], declare(TINY), TINY, make_mesh(MeshConfig(1, 4, 2)), ShardingRules())
for (name, have), (_, want) in zip(named_leaves(params), named_leaves(random_params()), strict=True):
    for shard in have.addressable_shards:
        if name != "newline":
            np.testing.assert_array_equal(shard.data, want[shard.index], err_msg=name)
print("same", len(jax.devices()), len(jax.local_devices()))
"""


@pytest.mark.slow
def test_two_processes_of_four_devices_each_load_their_parts(models):
    port = str(free_port())
    processes = [run(TWO, str(models["float32"]), port, str(i), devices=4) for i in range(2)]
    assert [process.communicate(timeout=300)[0].strip() for process in processes] == ["same 8 4"] * 2


MEASURED = """
import gc, json, re, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from mmrlhf_jax.models import key_table
from mmrlhf_jax.models.key_table import Key, load
from mmrlhf_jax.models.safetensors_files import SafetensorsDirectory
from mmrlhf_jax.nn.params import Param
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

layers, embed, mlp, vocab = map(int, sys.argv[2:6])
dtype = sys.argv[6]
declared = {
    "vocabulary": Param((vocab, embed), ("vocab", "embed"), dtype=jnp.dtype(dtype)),
    "up": Param((layers, embed, mlp), ("layers", "embed", "mlp"), dtype=jnp.dtype(dtype)),
}
keys = [
    Key("vocabulary", "embed.weight"),  # loaded last, when the devices hold the rest already
    Key("up", "layers.{layer}.up.weight", "f d -> d f"),
]

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

mesh = make_mesh(MeshConfig(1, 4, 2))
jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
before, peak, held, done = anonymous(), 0, 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
started = time.time()
with SafetensorsDirectory(sys.argv[1], str) as source:
    params = load(source, declared, keys, mesh, ShardingRules())
jax.block_until_ready(params)
seconds = time.time() - started
done = True
watcher.join()
held = sum(shard.data.nbytes for leaf in params.values() for shard in leaf.addressable_shards)
sums = [float(jnp.sum(params["up"][layer, 0].astype(jnp.float32))) for layer in (0, layers - 1)]
print(json.dumps({"before": before, "peak": peak, "held": held, "seconds": seconds, "sums": sums}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_loading_4_gb_takes_two_tensors_and_a_gigabyte_besides_what_the_devices_hold(tmp_path, wanted):
    """Peak anonymous memory above the process's start; on this backend what devices hold is host memory too, and is
    subtracted. As many layers as a 7B model; the embedding, the largest tensor, comes last, when the rest is held."""
    import json
    import shutil

    from mmrlhf_jax.models.safetensors_files import Outgoing, write_safetensors

    layers, embed, mlp, vocab = 28, 2048, 28672, 152064
    largest, whole = 2 * vocab * embed, 2 * (vocab * embed + layers * embed * mlp)
    assert whole > 3.9e9
    if shutil.disk_usage(tmp_path).free < 2 * whole:
        pytest.skip(f"needs {2 * whole / 1e9:.0f} GB of disk")
    random = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(random, shape)

    shapes = {"embed.weight": (vocab, embed)}
    shapes |= {f"layers.{layer}.up.weight": (mlp, embed) for layer in range(layers)}
    outgoing = [Outgoing(name, shape, "bfloat16", lambda shape=shape: values(shape)) for name, shape in shapes.items()]
    write_safetensors(outgoing, tmp_path)
    try:
        process = run(MEASURED, str(tmp_path), *map(str, (layers, embed, mlp, vocab)), wanted, devices=8)
        said = process.communicate(timeout=1200)[0]
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
    measured = json.loads(said.splitlines()[-1])
    held, peak, before = measured["held"], measured["peak"], measured["before"]
    extra = peak - before - held
    print(
        f"{whole / 1e9:.2f} GB read as {wanted}: devices hold {held / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB (start "
        f"{before / 1e9:.2f}), besides {extra / 1e9:.2f} GB; largest tensor {largest / 1e9:.2f} GB; "
        f"{measured['seconds']:.1f} s"
    )
    assert held == whole * (2 if wanted == "float32" else 1)
    expected = float(values((mlp, embed))[:, 0].astype(np.float32).sum())
    np.testing.assert_allclose(measured["sums"], expected, rtol=1e-3, atol=1e-2)
    assert extra < 2 * largest + 2**30

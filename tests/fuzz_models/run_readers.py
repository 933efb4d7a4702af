"""The readers of RUN directories: what a run notes of itself, its checkpoints as a MODEL, and what a run resumes with.

Models and optimizer have few parameters here, and the configuration is given: it has a reader of its own, and all of
it would take a hundred times as long.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from etils import epath
from fuzz_models.harness import Reader
from fuzz_models.mutations import dumps, local, mutate_bytes, mutate_document, mutate_file, strange
from fuzz_models.samples import file_of, mesh, tiny_config, twice

from mmrlhf_jax.models import files
from mmrlhf_jax.models.llava_onevision import adapter
from mmrlhf_jax.nn.params import Param, abstract, map_named
from mmrlhf_jax.nn.sharding import ShardingRules
from mmrlhf_jax.training import best, manifest, setup
from mmrlhf_jax.training import model as run_model
from mmrlhf_jax.training import run as run_directory
from mmrlhf_jax.training.recipe import INFERENCE, CheckpointConfig

# --- what a run notes of itself -----------------------------------------------------------------------------------

_LORA = {"rank": 4, "alpha": 8.0, "targets": ["decoder.kernel"]}


def _write_notes(rng: Random, directory: Path) -> None:
    """recipe.json and evaluation.jsonl."""
    recipe = mutate_document(rng, {"evaluation.metric": "loss"}, rng.choice((0, 0, 1)))
    (directory / "recipe.json").write_bytes(dumps(recipe))
    metric = rng.choice(("loss", "loss", "rewards/accuracies"))
    records = [mutate_document(rng, {"step": n, f"eval/{metric}": 1.0 / n}, rng.choice((0, 0, 1))) for n in (1, 2, 3)]
    lines = b"".join(dumps(record) + b"\n" for record in records)
    if rng.random() < 0.95:
        (directory / "evaluation.jsonl").write_bytes(mutate_bytes(rng, lines) if rng.random() < 0.1 else lines)


def write_run_case(rng: Random, directory: Path) -> None:
    start = {"base": "owner/base", "lora": _LORA, "fingerprint": "x"}
    if rng.random() < 0.1:
        start["base"] = str(directory)
    mutate_file(rng, directory / "start.json", twice, start, local)
    _write_notes(rng, directory)


def read_run_case(directory: Path) -> None:
    run_model._check_chain(str(directory))
    run_model.base_of(str(directory))
    made_with = files.read_json(epath.Path(directory) / "start.json").get("lora")
    if made_with:
        run_model._lora_settings(str(directory), made_with)
    run_model._best(run_directory.RunDirectory.at(directory), [1, 2, 3])


# --- checkpoints ----------------------------------------------------------------------------------------------------

DECLARED = {
    "decoder": {"kernel": Param((3, 2), (None, None), "normal", fan_in=3), "norm": Param((2,), (None,), "ones")}
}
_ADAPTERS = {"decoder.kernel.a": (3, 4), "decoder.kernel.b": (4, 2)}
POSITION = {"plan": "p", "model": "m"}


@cache
def small_state() -> Any:
    """A TrainState of zeros, and its shardings."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from mmrlhf_jax.training.state import TrainState, partition

    everywhere = NamedSharding(mesh(), PartitionSpec())
    placed = abstract(DECLARED, mesh(), ShardingRules())
    params = map_named(lambda _, leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), placed)
    trainable, frozen = partition(params, lambda name: name == "decoder.kernel")
    moments = {"moment": jax.device_put(jnp.zeros((3, 2)), everywhere)}
    state = TrainState(jax.device_put(jnp.int32(0), everywhere), trainable, frozen, moments)
    return state, TrainState(everywhere, None, None, None)


CORPUS = Path(__file__).parents[1] / "data" / "fuzz_checkpoints.zip"


@cache
def checkpoint_files(adapters: bool) -> dict[str, bytes]:
    """The files of a RUN's checkpoints 1 and 2. Kept, since orbax gives its files other names and bytes each time, and
    a seed shall name a case."""
    within = "adapters/" if adapters else "whole/"
    with zipfile.ZipFile(CORPUS) as kept:
        return {
            name.removeprefix(within): kept.read(name) for name in sorted(kept.namelist()) if name.startswith(within)
        }


def write_corpus() -> None:
    """Makes the file anew; for by hand: PYTHONPATH=tests:. python -m fuzz_models.run_readers"""
    with zipfile.ZipFile(CORPUS, "w") as kept:
        for within, adapters in (("adapters/", True), ("whole/", False)):
            for name, data in _made(adapters).items():
                kept.writestr(zipfile.ZipInfo(within + name), data, zipfile.ZIP_DEFLATED)


def _made(adapters: bool) -> dict[str, bytes]:
    """As Checkpoints.save lays it out."""
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    leaves = {name: jnp.ones(shape) for name, shape in _ADAPTERS.items()}
    if not adapters:
        leaves = {f"decoder.{name}": jnp.ones(param.shape) for name, param in DECLARED["decoder"].items()}
    with tempfile.TemporaryDirectory() as top, ocp.CheckpointManager(f"{top}/checkpoints") as manager:
        for step in (1, 2):
            position = {**POSITION, "step": step, "dtypes": dict.fromkeys(leaves, "float32")}
            parts = {
                "params": ocp.args.StandardSave(leaves),
                "optimizer": ocp.args.StandardSave({"moment": jnp.ones((3, 2))}),
                "position": ocp.args.JsonSave(position),
            }
            manager.save(step, args=ocp.args.Composite(**parts))
        manager.wait_until_finished()
        for step in (1, 2):
            manifest.seal(epath.Path(f"{top}/checkpoints/{step}"), 0.5)
        return {str(file.relative_to(top)): file.read_bytes() for file in Path(top).rglob("*") if file.is_file()}


def _write_checkpoints(rng: Random, directory: Path, adapters: bool, damage: float) -> None:
    """Some whole, some with a file spoiled, with or without a manifest, which may be spoiled itself."""
    spoiled = [step for step in ("1", "2") if rng.random() < damage]
    sealed = rng.random() < 0.6
    written = []
    for name, data in checkpoint_files(adapters).items():
        if sealed or not name.endswith(manifest.MANIFEST):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
            written.append(name)
    for step in spoiled:
        name = rng.choice([name for name in written if name.startswith(f"checkpoints/{step}/")])
        _spoil(rng, directory / name)
        if sealed and rng.random() < 0.6:
            _spoil_manifest(rng, directory / "checkpoints" / step / manifest.MANIFEST)
    if rng.random() < 0.05:
        (directory / "checkpoints" / rng.choice(("3", "03", "-1", "x", "4.orbax-checkpoint-tmp"))).mkdir()


def _spoil(rng: Random, file: Path) -> None:
    data, kind = file.read_bytes(), rng.randrange(4)
    if kind == 0:
        file.unlink()
        _replace(rng.randrange(8), file)
    elif data[:1] == b"{" and kind < 3:
        file.write_bytes(dumps(mutate_document(rng, json.loads(data), 1)))
    else:
        file.write_bytes(mutate_bytes(rng, data))


def _replace(kind: int, file: Path) -> None:
    """By what is no such file, or by nothing."""
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        os.symlink("/dev/zero", file)
    elif kind == 3:
        os.symlink(file.name, file)
    elif kind == 4:
        with file.open("wb") as sparse:
            sparse.truncate(2**26)


def _spoil_manifest(rng: Random, file: Path) -> None:
    """As nobody writes it, or as one who altered the checkpoint would: of the files as they are, or of none."""
    kind = rng.randrange(5)
    if file.exists() and not file.is_file():
        return
    if kind == 0:
        file.unlink(missing_ok=True)
        manifest.seal(epath.Path(file.parent), 0.5)
    elif file.is_symlink():
        return
    elif kind == 1:
        file.write_bytes(dumps({"bytes": 1, "seconds": 1, "files": {}}))
    elif kind == 2:
        file.write_bytes(dumps({"bytes": 1, "seconds": 1, "files": {"position/metadata": strange(rng)}}))
    elif file.is_file():
        try:
            document = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            return
        file.unlink()
        mutate_file(rng, file, twice, document)


def write_checkpoint_case(rng: Random, directory: Path) -> None:
    """A RUN, one with adapters whose base is another, or a PEFT directory whose base is one."""
    (directory / "which").write_text(rng.choice(("", "", "", "@best", "@1", "@2", "@3", "@" + "9" * 30)))
    if rng.random() < 0.05:
        (directory / "base").mkdir()
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(directory / "base")}
        (directory / adapter.CONFIG).write_bytes(local(dumps(twice(rng, settings))))
        (directory / "which").write_text("")
        _write_base(rng, directory / "base")
        return
    adapters = rng.random() < 0.25
    _write_notes(rng, directory)
    _write_checkpoints(rng, directory, adapters, 0.5)
    (directory / "start.json").write_bytes(b"{}")
    if adapters:
        base = directory / "base"
        base.mkdir()
        _write_base(rng, base)
        lora = _LORA if rng.random() < 0.9 else twice(rng, _LORA)
        (directory / "start.json").write_bytes(dumps({"base": str(base), "lora": lora}))


def _write_base(rng: Random, base: Path) -> None:
    (base / "start.json").write_bytes(b"{}")
    (base / "recipe.json").write_bytes(b"{}")
    _write_checkpoints(rng, base, False, 0.05)


def read_checkpoint_case(directory: Path) -> None:
    given = {"read_config": lambda _: tiny_config(), "declare": lambda _: DECLARED}
    which = (directory / "which").read_text()
    with mock.patch.multiple(run_model, **given):
        run_model.load_model(f"{directory}{which}", mesh(), ShardingRules(), rates=INFERENCE)


# --- what a run resumes with ----------------------------------------------------------------------------------------


def write_resume_case(rng: Random, directory: Path) -> None:
    _write_checkpoints(rng, directory, False, 0.6)
    if rng.random() < 0.05:
        (directory / "damaged" / "2").mkdir(parents=True)
    (directory / "plan").write_text("other" if rng.random() < 0.03 else "p")


def _counter(step: int, shardings: Any) -> Any:
    """As setup.py's, which is compiled each time: twice as long as all else."""
    import jax
    import numpy as np

    return jax.device_put(np.int32(step), shardings.step)


def read_resume_case(directory: Path) -> None:
    run = run_directory.RunDirectory.at(directory)
    position = {**POSITION, "plan": (directory / "plan").read_text()}
    state, shardings = small_state()
    with mock.patch.object(setup, "say"), mock.patch.object(setup, "_counter", _counter):
        checkpoints = run_directory.Checkpoints(run.checkpoints, CheckpointConfig())
        try:
            resumed = setup.resume(run, checkpoints, state, shardings, position, whole=True)
        finally:
            checkpoints.close()
    assert int(resumed.step) in (0, 1, 2)


_WRITERS = ("write_text", "save", "_seal", "check", "_settle", "should_preserve")  # of a run
_MESSAGES = ("_is_ours_to_say", "_say_once")  # hooks of logging, which read nothing
READERS = (
    Reader("run", write_run_case, read_run_case, {
        # these are the reader "checkpoint", or the functions below
        file_of(run_model): ("load_model", "load_adapters", "_open", "_reading", "_stored_dtypes", "_bare", "<lambda>",
                             "absolute", "assets_of",
                             # they take a model that is loaded
                             "check_family", "with_fresh_head", "model_fingerprint", "with_fresh_adapters"),
        file_of(best): ("is_best", "best_trained", "ran_out_of_patience"),  # of records in memory
    }),
    Reader("checkpoint", write_checkpoint_case, read_checkpoint_case, {
        # they take a model that is loaded; `absolute` is the reader "name"
        file_of(run_model): ("check_family", "with_fresh_head", "model_fingerprint", "with_fresh_adapters", "absolute"),
        file_of(manifest): ("seal", "set_aside"),  # they write
        # the last four are the reader "resume", `read_lines` is "run"
        file_of(run_directory): (*_WRITERS, *_MESSAGES, "optimizer", "set_aside", "has_begun", "has_manifest",
                                 "abstract_of", "read_lines"),
    }),
    Reader("resume", write_resume_case, read_resume_case, {
        file_of(manifest): ("seal",),  # it writes
        file_of(run_directory): (*_WRITERS, *_MESSAGES, "exists", "has_begun", "read_lines"),
    }),
)  # fmt: skip

if __name__ == "__main__":
    write_corpus()

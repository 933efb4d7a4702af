"""A RUN on disk, and loading a MODEL: a Hugging Face directory, a hub id, or a RUN.

RUN/recipe.json       the resolved recipe
RUN/start.json        fingerprints of what the run started from
RUN/model/            config, tokenizer, templates of the model it started from
RUN/checkpoints/N/    parameters, optimizer and data position after N steps
RUN/metrics.jsonl     one line a step
RUN/complete.json     written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from mmrlhf_jax.models.llava_onevision import weights
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig, read_config
from mmrlhf_jax.models.llava_onevision.lmms_lab import assets_directory
from mmrlhf_jax.models.llava_onevision.model import LlavaOnevision, declare
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import ShardingRules
from mmrlhf_jax.training.recipe import CheckpointConfig, PartRates
from mmrlhf_jax.training.state import TrainState, combine, with_dtypes


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    recipe = property(lambda self: self.path / "recipe.json")
    start = property(lambda self: self.path / "start.json")
    model = property(lambda self: self.path / "model")
    checkpoints = property(lambda self: self.path / "checkpoints")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    complete = property(lambda self: self.path / "complete.json")

    def exists(self) -> bool:
        return self.recipe.exists()


class Checkpoints:
    """Orbax checkpoints of a run: parameters and optimizer by name, and the position in the data.

    A checkpoint appears under its step number only when whole; saving runs beside training.
    """

    def __init__(self, directory: Path, config: CheckpointConfig | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep if config else None,
            cleanup_tmp_directories=config is not None,
            enable_async_checkpointing=config is not None,
            create=config is not None,
        )
        self.manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: TrainState, position: Mapping[str, Any]) -> None:
        step = int(position["step"])
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(_by_name(combine(state.trainable, state.frozen))),
                optimizer=ocp.args.StandardSave(_by_name(state.optimizer)),
                position=ocp.args.JsonSave({**position, "dtypes": _dtypes(state)}),
            ),
            force=True,
        )

    def position(self, step: int) -> dict[str, Any]:
        return self.manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]

    def params(self, step: int, abstract: Any) -> Any:
        """Model parameters of a checkpoint, in the shardings and dtypes of `abstract`."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_by_name(abstract)))
        return _from_names(self.manager.restore(step, args=args)["params"], abstract)

    def optimizer(self, step: int, abstract: Any) -> Any:
        args = ocp.args.Composite(optimizer=ocp.args.StandardRestore(_by_name(abstract)))
        return _from_names(self.manager.restore(step, args=args)["optimizer"], abstract)

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(nn_params.named_leaves(tree))


def _dtypes(state: TrainState) -> dict[str, str]:
    return {name: leaf.dtype.name for name, leaf in _by_name(combine(state.trainable, state.frozen)).items()}


def _from_names(leaves: Mapping[str, Any], like: Any) -> Any:
    return nn_params.map_named(lambda name, _: leaves[name], like)


@dataclass(frozen=True)
class LoadedModel:
    """A MODEL in memory; `assets` is the directory with its config, tokenizer and templates."""

    config: LlavaOnevisionConfig
    params: LlavaOnevision
    assets: epath.Path
    step: int | None = None  # of the checkpoint, for a RUN


def is_run(model: str) -> bool:
    return RunDirectory(Path(model)).exists()


def assets_of(model: str) -> epath.Path:
    """The directory of a MODEL's config, tokenizer and templates; downloads a hub id's files."""
    return epath.Path(RunDirectory(Path(model)).model) if is_run(model) else assets_directory(weights.resolve(model))


def load_model(
    model: str,
    mesh: Mesh,
    rules: ShardingRules,
    *,
    rates: PartRates,
    dtype: str | None = None,
    step: int | None = None,
) -> LoadedModel:
    """Parameters of a MODEL in their shards: parts with a rate in fp32, the others in `dtype`, or as they are stored.

    `step` picks a RUN's checkpoint, its latest by default. Raises FileNotFoundError or ValueError saying what is
    missing.
    """
    assets = assets_of(model)
    config = read_config(str(assets))
    bare = declare(config)
    if not is_run(model):
        directory = weights.resolve(model)
        declared = with_dtypes(bare, rates, dtype or weights.stored_dtypes(directory, bare))
        return LoadedModel(config, weights.load_params(directory, declared, config, mesh, rules), assets)
    checkpoints = Checkpoints(RunDirectory(Path(model)).checkpoints)
    step = checkpoints.latest() if step is None else step
    if step is None or step not in checkpoints.manager.all_steps():
        have = ", ".join(map(str, checkpoints.manager.all_steps()))
        raise FileNotFoundError(f"{model}: no checkpoint {f'{step}; there: {have}' if have else 'yet'}")
    declared = with_dtypes(bare, rates, dtype or checkpoints.position(step)["dtypes"])
    params = checkpoints.params(step, nn_params.abstract(declared, mesh, rules))
    checkpoints.close()
    return LoadedModel(config, params, assets, step)


INFERENCE = PartRates(decoder=0.0, projector=0.0, tower=0.0)  # every part as it is stored


def model_fingerprint(config: LlavaOnevisionConfig, params: LlavaOnevision) -> str:
    """Names a model's function: its configuration and its weights, however they are stored or sharded."""
    described = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return f"{nn_params.fingerprint(params)}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"


def abstract_of(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays that exist."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

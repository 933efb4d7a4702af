"""Loading a MODEL: a Hugging Face directory, a hub id, a PEFT adapter directory, or a RUN (RUN@best, RUN@STEP)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath
from jax.sharding import Mesh

from mmrlhf_jax.models import families
from mmrlhf_jax.models.critique_reward.config import SETTINGS
from mmrlhf_jax.models.critique_reward.model import declare_head, with_head
from mmrlhf_jax.models.families import declare, read_config
from mmrlhf_jax.models.files import check_model_name, is_number, read_json, shown
from mmrlhf_jax.models.llava_onevision import weights
from mmrlhf_jax.models.llava_onevision.adapter import (
    CONFIG,
    MOST_ALPHA,
    MOST_RANK,
    is_adapter_directory,
    load_adapted,
    read_adapter_config,
)
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.lmms_lab import assets_directory
from mmrlhf_jax.models.safetensors_files import DTYPES
from mmrlhf_jax.nn import lora
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import ShardingRules
from mmrlhf_jax.storage import is_remote
from mmrlhf_jax.training.best import best_step
from mmrlhf_jax.training.recipe import INFERENCE, LoraConfig, PartRates
from mmrlhf_jax.training.run import Checkpoints, RunDirectory
from mmrlhf_jax.training.state import partition, trains_with_lora, with_dtypes

MOST_BASES = 8  # adapters on adapters
_CHECKPOINT = re.compile(r"(?P<run>.+)@(?P<step>best|\d+)")


@dataclass(frozen=True)
class LoadedModel:
    """A MODEL in memory; `assets` is the directory with its config, tokenizer and templates.

    A reward model has a CritiqueRewardConfig and CritiqueReward parameters, a policy a LlavaOnevision.
    """

    config: LlavaOnevisionConfig
    params: Any
    assets: epath.Path
    step: int | None = None  # of the checkpoint, for a RUN


def split_model(model: str) -> tuple[str, str | None]:
    """`RUN@best` and `RUN@120` as (RUN, which checkpoint); anything else as (model, None)."""
    found = _CHECKPOINT.fullmatch(check_model_name(model))
    return (found["run"], found["step"]) if found and is_run(found["run"]) else (model, None)


def is_run(model: str) -> bool:
    return RunDirectory.at(model).exists()


def absolute(model: str) -> str:
    """A MODEL as a name that means the same from any working directory."""
    name, which = split_model(model)
    if not is_remote(name) and Path(name).exists():
        name = str(Path(name).absolute())
    return f"{name}@{which}" if which else name


def assets_of(model: str) -> epath.Path:
    """The directory of a MODEL's config, tokenizer and templates; downloads a hub id's files."""
    _check_chain(model)
    model, _ = split_model(model)
    if is_run(model):
        return RunDirectory.at(model).model
    if is_adapter_directory(model):
        return assets_of(read_adapter_config(model).base)
    return assets_directory(weights.resolve(model))


def load_model(
    model: str,
    mesh: Mesh,
    rules: ShardingRules,
    *,
    rates: PartRates,
    dtype: str | None = None,
) -> LoadedModel:
    """Parameters of a MODEL in their shards: parts with a rate in fp32, the others in `dtype`, or as they are stored.

    Adapters, of a LoRA run or of a PEFT directory, are merged into their kernels, which are then fp32. Raises
    FileNotFoundError or ValueError saying what is missing.
    """
    if (loaded := load_adapters(model, mesh, rules, rates=rates, dtype=dtype)) is not None:
        return dataclasses.replace(loaded, params=lora.merge(loaded.params))
    name, which = split_model(model)
    assets = assets_of(model)
    config = read_config(assets)
    bare, keys = declare(config), families.keys_of(config)
    if not is_run(name):
        directory = weights.resolve(name)  # the assets of lmms-lab's layout lie elsewhere
        declared = with_dtypes(bare, rates, dtype or weights.stored_dtypes(directory, bare, keys))
        return LoadedModel(config, weights.load_params(directory, declared, config, mesh, rules, keys), assets)
    checkpoints, step = _open(name, which)
    with _reading(f"{name}: checkpoint {step}"):
        declared = with_dtypes(bare, rates, dtype or _stored_dtypes(checkpoints.position(step)["dtypes"]))
        params = checkpoints.params(step, nn_params.abstract(declared, mesh, rules))
    checkpoints.close()
    return LoadedModel(config, params, assets, step)


def load_adapters(
    model: str, mesh: Mesh, rules: ShardingRules, *, rates: PartRates = INFERENCE, dtype: str | None = None
) -> LoadedModel | None:
    """The model of a LoRA run or PEFT directory with its adapters beside its kernels; None for any other MODEL."""
    _check_chain(model)
    name, which = split_model(model)
    if is_adapter_directory(name):
        with _naming_base(f"{name}/{CONFIG}"):
            base = load_model(read_adapter_config(name).base, mesh, rules, rates=rates, dtype=dtype)
        params = load_adapted(name, base.params, declare(base.config), mesh, rules)
        return dataclasses.replace(base, params=params, step=None)
    if not is_run(name):
        return None
    made_with = read_json(RunDirectory.at(name).start).get("lora")
    if not made_with:
        return None
    settings = _lora_settings(name, made_with)
    with _naming_base(RunDirectory.at(name).start):
        base = load_model(base_of(model), mesh, rules, rates=rates, dtype=dtype)
    config = read_config(assets_of(name))
    try:
        declared = lora.declare_adapted(declare(config), settings.targets, settings.rank, settings.alpha)
    except ValueError as error:
        raise ValueError(f"{RunDirectory.at(name).start}: {error}") from error
    stored, _ = partition(declared, trains_with_lora)
    checkpoints, step = _open(name, which)
    with _reading(f"{name}: checkpoint {step}"):
        restored = dict(nn_params.named_leaves(checkpoints.params(step, nn_params.abstract(stored, mesh, rules))))
    checkpoints.close()
    kernels = dict(nn_params.named_leaves(base.params))
    params = nn_params.map_named(lambda at, _: restored[at] if at in restored else kernels[_bare(at)], declared)
    return LoadedModel(config, params, RunDirectory.at(name).model, step)


@contextmanager
def _naming_base(file: epath.PathLike) -> Iterator[None]:
    """A base that is not there is told with the file that names it: nobody has typed it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: its base is not there: {error}") from error


def base_of(model: str) -> str:
    """The MODEL under the adapters of a LoRA run or PEFT directory."""
    name, _ = split_model(model)
    if not is_run(name):
        return read_adapter_config(name).base
    start = RunDirectory.at(name).start
    return check_model_name(read_json(start).get("base"), f"{start}: base")


def _check_chain(model: str) -> None:
    """An adapter's base may be one in turn. Raises ValueError where that has no end."""
    seen = [name := model]
    while is_adapter_directory(bare := split_model(name)[0]) or (is_run(bare) and _is_adapted(bare)):
        name = base_of(name)
        if name in seen or len(seen) == MOST_BASES:
            raise ValueError(f"{model}: adapters on adapters without an end: {' -> '.join([*seen, name])}")
        seen.append(name)


def _is_adapted(run: str) -> bool:
    return bool((start := RunDirectory.at(run).start).exists() and read_json(start).get("lora"))


def _lora_settings(run: str, made_with: Any) -> LoraConfig:
    """The adapters' settings as start.json states them. Raises ValueError where it cannot be so."""
    try:
        targets = tuple(made_with["targets"])
        settings = LoraConfig(**{**made_with, "targets": targets})
        sane = all(isinstance(target, str) for target in targets) and type(settings.rank) is int
        sane = sane and 1 <= settings.rank <= MOST_RANK and is_number(settings.alpha, 0, MOST_ALPHA)
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        raise ValueError(f"{RunDirectory.at(run).start}: lora = {shown(made_with)} are no settings of adapters")
    return settings


def _stored_dtypes(dtypes: Any) -> dict[str, str]:
    if not isinstance(dtypes, dict) or not all(isinstance(name, str) and name in DTYPES for name in dtypes.values()):
        raise ValueError(f"dtypes = {shown(dtypes)}, supported: {', '.join(DTYPES)}")
    return dtypes


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """A checkpoint that is damaged, or was made to be, is one message: orbax raises a dozen kinds of error."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
        raise ValueError(f"{what} does not read, it is damaged: {reason}") from error


def _bare(name: str) -> str:
    return name.removesuffix(".base")


def _open(run: str, which: str | None) -> tuple[Checkpoints, int]:
    """The checkpoints of a RUN and the step asked for."""
    directory = RunDirectory.at(run)
    with _reading(f"{run}: {directory.checkpoints.name}"):
        checkpoints = Checkpoints(directory.checkpoints)
        have = checkpoints.steps()
    step = _best(directory, have) if which == "best" else checkpoints.latest() if which is None else int(which)
    if step is None or step not in have:
        there = ", ".join(map(str, have))
        raise FileNotFoundError(f"{run}: no checkpoint {f'{step}; there: {there}' if there else 'yet'}")
    if (damage := checkpoints.damage(step)) is not None:
        others = f", such as {run}@{max(other)}" if (other := [n for n in have if n != step]) else ""
        raise ValueError(f"{run}: checkpoint {step} is damaged ({damage}): name another{others}")
    return checkpoints, step


def _best(directory: RunDirectory, have: list[int]) -> int:
    try:
        return best_step(directory, have)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeError) as error:
        files = f"{directory.recipe.name} or {directory.evaluation.name}"
        raise ValueError(f"{directory.path}: {files} is damaged, name a step: {shown(str(error))}") from error


def check_family(model: LoadedModel, name: str, *, reward: bool) -> LoadedModel:
    """`model`, where it is of the kind asked for. Raises ValueError naming what it is and how to get the other."""
    if families.is_reward(model.config) == reward:
        return model
    if reward:
        raise ValueError(f"{name}: a policy; a reward model is asked for here (see configs/critique_reward_7b.py)")
    raise ValueError(f"{name}: a reward model ({SETTINGS} or a released reward head); a policy is asked for here")


def with_fresh_head(
    start: LoadedModel,
    head: str,
    mesh: Mesh,
    rules: ShardingRules,
    seed: int,
    *,
    attributes: tuple[str, ...] = (),
    quantiles: int = 0,
) -> LoadedModel:
    """A policy under a new reward head; a reward model as it is."""
    if families.is_reward(start.config):
        return start
    config = families.reward_config(start.config, head, attributes, quantiles)
    fresh = nn_params.initialise(declare_head(config), seed, mesh, rules)
    return dataclasses.replace(start, config=config, params=with_head(start.params, fresh))


def model_fingerprint(config: LlavaOnevisionConfig, params: Any) -> str:
    """Names a model's function: its configuration and its weights, however they are stored or sharded."""
    shape = dataclasses.asdict(config)
    for name in ("attributes", "quantiles"):  # of a head of one output: named as before there were others
        if not shape.get(name):
            shape.pop(name, None)
    described = json.dumps(shape, sort_keys=True)
    return f"{nn_params.fingerprint(params)}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"


def with_fresh_adapters(start: LoadedModel, settings: LoraConfig, mesh: Mesh, rules: ShardingRules, seed: int) -> Any:
    """The parameters of `start` under new adapters, which change nothing yet."""
    return lora.adapt(
        start.params,
        declare(start.config),
        mesh,
        rules,
        targets=settings.targets,
        rank=settings.rank,
        alpha=settings.alpha,
        seed=seed,
    )

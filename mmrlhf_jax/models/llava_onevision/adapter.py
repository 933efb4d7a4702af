"""LoRA adapters under PEFT's file names (adapter_config.json, adapter_model.safetensors), in and out.

The names derive from the checkpoint's own key table: where it maps `X.weight` [out, in], an adapter holds
`base_model.model.X.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], X being the module's path in transformers 5.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath
from jax.sharding import Mesh
from safetensors.numpy import save

from mmrlhf_jax import storage
from mmrlhf_jax.models.files import check_model_name, is_number, read_json, shown
from mmrlhf_jax.models.key_table import Key, export_tensors, load
from mmrlhf_jax.models.llava_onevision.model import LlavaOnevision
from mmrlhf_jax.models.llava_onevision.weights import KEYS
from mmrlhf_jax.models.safetensors_files import SafetensorsDirectory
from mmrlhf_jax.nn.lora import ADAPTABLE, Adapted, adapter_params
from mmrlhf_jax.nn.params import map_named, named_leaves
from mmrlhf_jax.nn.sharding import ShardingRules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_RANK, MOST_ALPHA = 65_536, 1_000_000
# settings under which an adapter is not W + scale B A on kernels alone; value: what leaves it so
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "use_qalora": (False, None), "bias": ("none", None), "lora_bias": (False, None),
    "modules_to_save": (None, []), "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "alora_invocation_tokens":
    (None, []), "trainable_token_indices": (None, [], {}), "target_parameters": (None, []), "fan_in_fan_out": (False,
    None),
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter directory says of itself; `base` is the MODEL it adapts."""

    base: str
    rank: int
    scale: float


def is_adapter_directory(directory: str) -> bool:
    return (epath.Path(directory) / CONFIG).exists()


def read_adapter_config(directory: str) -> AdapterConfig:
    """Raises ValueError naming every setting that makes it more than a low-rank update of kernels."""
    path = epath.Path(directory) / CONFIG
    raw = read_json(path)
    problems = [
        f"{name} = {shown(raw[name])}" for name, plain in _PLAIN.items() if name in raw and raw[name] not in plain
    ]
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type = {shown(raw.get('peft_type'))}")
    if problems:
        raise ValueError(f"{path}: only plain LoRA adapters are served; not so here: {', '.join(problems)}")
    rank, alpha, base = raw.get("r"), raw.get("lora_alpha"), raw.get("base_model_name_or_path")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise ValueError(f"{path}: r = {shown(rank)}, a whole number from 1 to {MOST_RANK:,} is needed")
    if not is_number(alpha, 0, MOST_ALPHA):
        raise ValueError(f"{path}: lora_alpha = {shown(alpha)}, a number from 0 to {MOST_ALPHA:,} is needed")
    if not base:
        raise ValueError(f"{path}: base_model_name_or_path is missing; write there what the adapter adapts")
    check_model_name(base, f"{path}: base_model_name_or_path")
    return AdapterConfig(base, rank, float(alpha or 0) / (rank**0.5 if raw.get("use_rslora") else rank))


def load_adapted(
    directory: str, params: LlavaOnevision, declared: LlavaOnevision, mesh: Mesh, rules: ShardingRules
) -> LlavaOnevision:
    """`params` with the adapters of a PEFT directory on them, fp32. Raises ValueError listing what does not fit."""
    config = read_adapter_config(directory)
    with SafetensorsDirectory(directory, _canonical) as source:
        adapted = [key.ours for key in _adaptable() if _names(key)[0].format(layer=0) in source.where]
        if not adapted:
            raise ValueError(f"{directory}: {WEIGHTS} adapts no kernel of this model's decoder or projector")
        wanted = {name: {"a": a, "b": b} for name, (a, b) in adapter_params(declared, adapted, config.rank).items()}
        loaded = load(source, wanted, _adapter_keys(adapted), mesh, rules)

    def one(name: str, leaf: Any) -> Any:
        return Adapted(leaf, loaded[name]["a"], loaded[name]["b"], config.scale) if name in loaded else leaf

    return map_named(one, params)


def save_adapter(params: LlavaOnevision, output: str, *, base: str) -> bool:
    """The adapters of an adapted tree as a PEFT directory that peft.PeftModel loads over `base`; fp32, and exact.

    A local `output` appears only when whole, a remote one is no adapter until its configuration, the last file, is
    there. Returns whether it was written: False where the same adapter is there already, as of a program that was
    killed at its very end.

    Raises FileExistsError when anything else is there, ValueError when `params` has no adapter.
    """
    files = _files(params, base)
    directory = epath.Path(output)
    if directory.exists():
        if all((directory / name).exists() and (directory / name).read_bytes() == files[name] for name in files):
            return False
        unfinished = "" if is_adapter_directory(output) else f" (without {CONFIG}: an upload that was cut off?)"
        raise FileExistsError(f"{output} exists already{unfinished}; name another --output or remove it")
    with storage.new_directory(directory, last=(CONFIG,)) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return True


def _files(params: LlavaOnevision, base: str) -> dict[str, bytes]:
    """What a PEFT directory consists of."""
    kernels = dict(_adapted_kernels(params))
    if not kernels:
        raise ValueError("this model has no adapter; export its weights instead")
    rank = next(iter(kernels.values())).a.shape[-1]
    scale = next(iter(kernels.values())).scale
    outgoing = export_tensors(params, _adapter_keys(list(kernels)), "float32")
    document = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(scale * rank, 6),
        "target_modules": _target_modules(list(kernels)),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    return {
        WEIGHTS: save({tensor.name: tensor.values() for tensor in outgoing}, metadata={"format": "pt"}),
        CONFIG: (json.dumps(document, indent=2) + "\n").encode(),
    }


def _adapted_kernels(params: Any) -> list[tuple[str, Adapted]]:
    leaves = dict(named_leaves(params))
    names = [name.removesuffix(".a") for name in leaves if name.endswith(".a")]
    return [(name, _at(params, name)) for name in names]


def _at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = getattr(tree, part)
    return tree


def _adaptable() -> list[Key]:
    """The table's entries for matrices of the parts an adapter may change."""
    return [key for key in KEYS if key.ours.startswith(ADAPTABLE) and key.ours.endswith("_kernel")]


def _module(key: Key) -> str:
    """The module's path in transformers 5's LlavaOnevisionForConditionalGeneration."""
    name = key.theirs.removesuffix(".weight")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def _names(key: Key) -> tuple[str, str]:
    return f"base_model.model.{_module(key)}.lora_A.weight", f"base_model.model.{_module(key)}.lora_B.weight"


def _canonical(name: str) -> str:
    """transformers 5's module paths; adapters made with transformers 4 spell language_model.model.layers."""
    bare = name.removeprefix("base_model.model.").removeprefix("model.")
    return "base_model.model.model." + bare.replace("language_model.model.", "language_model.", 1)


def _adapter_keys(kernels: Sequence[str]) -> list[Key]:
    """The table of the adapters of `kernels`, derived from the kernels' own."""
    out = []
    for key in _adaptable():
        if key.ours not in kernels:
            continue
        outs, ins = re.findall(r"\([^)]*\)|\S+", key.pattern.split("->")[0])  # torch keeps [out, in]
        a, b = _names(key)
        out.append(Key(f"{key.ours}.a", a, f"z {ins} -> {ins.strip('()')} z"))
        out.append(Key(f"{key.ours}.b", b, f"{outs} z -> z {outs.strip('()')}"))
    return out


def _target_modules(kernels: Sequence[str]) -> str:
    """A pattern for PEFT's full match: bare names such as q_proj would hit the vision tower as well."""
    modules = [_module(key) for key in _adaptable() if key.ours in kernels]
    return "|".join(re.escape(module).replace(re.escape("{layer}"), r"\d+") for module in modules)

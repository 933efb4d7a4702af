"""Critiques of K answers, n each, on one shared prompt cache, against one `transformers.generate` call whose batch
holds each of the K x n sequences whole: same weights, same tokens, same stop rule, greedy, so that both must say the
same. Prompts are text, so that the other side is a plain Qwen2ForCausalLM.

Prefill is what one new token takes; decoding is what all of them take, less that. torch has as many threads as cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.groups import Branch, Rendered
from mmrlhf_jax.inference.engine import DecodeConfig, Request, decode
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.models.key_table import export_tensors
from mmrlhf_jax.models.llava_onevision import fresh
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute, declare
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.qwen2.weights import KEYS
from mmrlhf_jax.models.safetensors_files import write_safetensors
from mmrlhf_jax.models.siglip.config import SiglipConfig
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.runtime import set_up_jax

Run = Callable[[int], list[list[int]]]  # new tokens at most -> what each of the K x n branches said
Seconds = dict[str, dict[str, list[float]]]  # of each side and phase, one a repeat


@dataclass(frozen=True)
class Generate:
    """K x n critiques of one prompt: on a shared cache, and as one transformers.generate call of batch K x n. Needs
    torch (the parity extra)."""

    prompt: int = 1500
    """tokens of the prompt all branches share"""
    prefix: int = 16
    """tokens of each answer that is criticised, different in each"""
    responses: int = 4
    """K"""
    samples: int = 4
    """n"""
    new_tokens: int = 64
    repeats: int = 5
    decoder_layers: int = 8
    embed: int = 512
    vocab: int = 32000
    output: str | None = None
    """a JSON file for the figures"""


def model_config(command: Generate) -> LlavaOnevisionConfig:
    """A decoder as asked under a tower of one layer, which prompts without a picture never run."""
    heads = command.embed // 64
    return LlavaOnevisionConfig(
        tower=SiglipConfig(embed=64, layers=1, heads=1, mlp=64),
        decoder=Qwen2Config(
            vocab=command.vocab,
            embed=command.embed,
            layers=command.decoder_layers,
            heads=heads,
            kv_heads=max(1, heads // 4),
            head_dim=64,
            mlp=3 * command.embed,
        ),
        image_token=0,
        video_token=1,
    )


def random_prompt(command: Generate) -> Rendered:
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(8, command.vocab, count).astype(np.int32)

    none = np.zeros((command.prompt, 4), np.int32)
    branches = tuple(
        Branch(tokens(command.prefix), np.zeros(command.prefix, np.float32)) for _ in range(command.responses)
    )
    return Rendered(
        np.zeros((0, 384, 384, 3), np.uint8), tokens(command.prompt), none, none.astype(np.float32), branches
    )


def time_generate(command: Generate) -> None:
    """Prints seconds of both sides and their ratios. Raises CommandError where they do not say the same."""
    try:
        import torch
    except ImportError as error:
        raise CommandError(
            "the other side is torch, which is not installed: pip install 'mmrlhf-jax[parity]'"
        ) from error
    set_up_jax("float32")
    torch.set_num_threads(os.cpu_count() or 1)
    config, rendered, stop = model_config(command), random_prompt(command), command.vocab - 1
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    params = nn_params.initialise(declare(config), 0, mesh, ShardingRules())
    sides = {
        "ours": _ours(command, config, params, mesh, rendered, stop),
        "transformers": _theirs(config, params, rendered, command.samples, stop),
    }
    branches = command.responses * command.samples
    millions = nn_params.count(declare(config)) / 1e6
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {millions:.1f} M parameters "
        f"({config.decoder.layers} x {config.decoder.embed}, vocabulary {command.vocab}), fp32, greedy: one prompt of "
        f"{command.prompt} tokens, {command.responses} answers of {command.prefix} x {command.samples} critiques of "
        f"{command.new_tokens}"
    )
    said = {name: side(command.new_tokens) for name, side in sides.items()}  # compiles, too
    for side in sides.values():
        side(1)
    same = sum(a == b for a, b in zip(said["ours"], said["transformers"], strict=True))
    if same < branches:
        raise CommandError(f"only {same} of {branches} critiques are the same, so their times mean nothing")
    seconds: Seconds = {name: {"prefill": [], "all": []} for name in sides}
    for _ in range(command.repeats):
        for name, side in sides.items():
            for phase, tokens in (("prefill", 1), ("all", command.new_tokens)):
                began = time.perf_counter()
                side(tokens)
                seconds[name][phase].append(time.perf_counter() - began)
    row = _summary(command, config, seconds)
    print("\n".join(_lines(row, branches * command.new_tokens)))
    if command.output:
        Path(command.output).write_text(json.dumps({"command": dataclasses.asdict(command), **row}, indent=2) + "\n")


def _ours(command: Generate, config: Any, params: Any, mesh: Any, rendered: Rendered, stop: int) -> Run:
    request = Request(rendered.lengths, lambda: rendered, "benchmark")

    def run(new_tokens: int) -> list[list[int]]:
        ((_, said),) = decode(
            [request],
            params=params,
            config=config,
            mesh=mesh,
            compute=Compute(platform=mesh.devices.flat[0].platform),
            sampling=SamplingConfig(max_new_tokens=new_tokens),
            run=DecodeConfig(branches_per_device=command.responses * command.samples, multiple=4),
            samples=command.samples,
            stop=(stop,),
            tokens_per_tile=config.tokens_per_tile,
            tile_size=config.tower.image_size,
        )
        return [list(sample.token) for each in said for sample in each]

    return run


def _theirs(config: Any, params: Any, rendered: Rendered, samples: int, stop: int) -> Run:
    import torch
    from transformers import Qwen2ForCausalLM

    text = fresh.hf_config(config)["text_config"]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps({**text, "architectures": ["Qwen2ForCausalLM"]}))
        write_safetensors(export_tensors(params.decoder, KEYS, "float32"), Path(directory))
        model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = [np.concatenate([rendered.prompt, branch.token]) for branch in rendered.branches for _ in range(samples)]
    ids = torch.from_numpy(np.stack(rows)).long()

    def run(new_tokens: int) -> list[list[int]]:
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop,
            )
        said = out[:, ids.shape[1] :].tolist()
        return [row[: row.index(stop)] if stop in row else row for row in said]

    return run


def _summary(
    command: Generate, config: LlavaOnevisionConfig, seconds: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    """Medians of seconds and of the ratios of neighbouring repeats; the bytes both caches hold."""
    for taken in seconds.values():
        taken["decode"] = [whole - first for whole, first in zip(taken["all"], taken["prefill"], strict=True)]
    ratios = {
        phase: [b / a for a, b in zip(seconds["ours"][phase], seconds["transformers"][phase], strict=True)]
        for phase in ("prefill", "decode", "all")
    }
    decoder = config.decoder
    medians = {name: {phase: statistics.median(s) for phase, s in taken.items()} for name, taken in seconds.items()}
    token = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * 4  # keys and values, fp32
    branches, prefixes = command.responses * command.samples, command.responses * command.prefix
    return {
        "seconds": medians,
        "ratio": {phase: statistics.median(found) for phase, found in ratios.items()},
        "ratio_range": {phase: (min(found), max(found)) for phase, found in ratios.items()},
        "cache_bytes": {
            "ours": token * (command.prompt + prefixes + branches * (1 + command.new_tokens)),
            "transformers": token * branches * (command.prompt + command.prefix + command.new_tokens),
        },
    }


def _lines(row: dict[str, Any], tokens: int) -> list[str]:
    lines = []
    for phase in ("prefill", "decode", "all"):
        ours, theirs = (row["seconds"][name][phase] for name in ("ours", "transformers"))
        low, high = row["ratio_range"][phase]
        rate = f" ({tokens / ours:,.0f} and {tokens / theirs:,.0f} tokens/s)" if phase == "decode" else ""
        lines.append(
            f"{phase:8} ours {ours:6.2f} s, transformers {theirs:6.2f} s{rate}: {row['ratio'][phase]:.2f}x faster "
            f"({low:.2f} to {high:.2f})"
        )
    ours, theirs = (row["cache_bytes"][name] / 2**20 for name in ("ours", "transformers"))
    return [
        *lines,
        f"cache    ours {ours:.1f} MiB, transformers {theirs:.1f} MiB: {theirs / ours:.1f}x smaller; same critiques",
    ]

"""TRL's side of the step benchmark: DPOTrainer's loss on batches as its collator makes them, and torch's backward."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from mmrlhf_jax.batch import Entry
from mmrlhf_jax.benchmarks.machine import cores
from mmrlhf_jax.benchmarks.sides import Settings
from mmrlhf_jax.benchmarks.workload import Case, random_group
from mmrlhf_jax.models.llava_onevision.config import read_config


class TrlSide:
    """A policy and its reference, the tower frozen as ours is.

    As ours, in bf16: parameters that train are fp32 under autocast, all others as they are stored. `checkpointing` is
    TRL's default; without it a step is faster and holds more.
    """

    def __init__(self, settings: Settings, *, checkpointing: bool):
        _silence()
        torch.set_num_threads(cores())
        models = settings.models
        self._at_once, self._config = settings.pairs_at_once, read_config(models.policy)
        self._dtype = getattr(torch, settings.compute.dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = self._load(models.policy, self._dtype if models.adapter else torch.float32)
        policy.model.vision_tower.requires_grad_(False).to(self._dtype)
        trainer: Any = DPOTrainer(
            model=policy,
            ref_model=None if models.reference is None else self._load(models.reference, self._dtype),
            peft_config=_lora_config(models.adapter),
            args=DPOConfig(
                output_dir=str(Path(models.policy).parent / "trl"),
                beta=settings.beta,
                max_length=None,
                bf16=False,  # autocast is in step()
                use_cpu=self._device == "cpu",
                gradient_checkpointing=checkpointing,
                report_to="none",
            ),
            # never looked at: batches are made below, so that no processor, hence no torchvision, is needed
            train_dataset=Dataset.from_list([{"prompt": "?", "chosen": "!", "rejected": "."}]),
            processing_class=AutoTokenizer.from_pretrained(models.policy),
        )
        if models.adapter is not None:
            _fill_adapter(trainer.model, models.adapter)
        if checkpointing:  # as train() does, which is never called
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.model.train()
        self._trainer, self._model = trainer, trainer.model
        low = self._dtype != torch.float32
        self._autocast = functools.partial(torch.autocast, self._device, torch.bfloat16, enabled=low)

    def _load(self, path: str, dtype: torch.dtype) -> Any:
        load: Any = LlavaOnevisionForConditionalGeneration.from_pretrained
        return load(path, dtype=dtype).to(self._device)

    def prepare(self, case: Case, pairs: tuple[tuple[int, int], ...]) -> None:
        if case.groups > 1:
            raise ValueError("TRL is timed on one group at a time")
        self._case, self._group = case, random_group(self._config, case)
        self._micro = [pairs[i : i + self._at_once] for i in range(0, len(pairs), self._at_once)]
        self._share = [len(some) / len(pairs) for some in self._micro]

    def make_batches(self) -> None:
        """What its collator hands over, from tokens and tiles: pads, normalises pixels, moves to the device."""
        self._batches: list[dict[str, Any]] = []
        self._batches = [self._inputs(self._group, self._case, some) for some in self._micro]
        self._wait()

    def _inputs(self, group: Entry, case: Case, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """What its DataCollatorForVisionPreference hands over: chosen answers, then rejected ones, padded right."""
        answers = [group.rendered.branches[k].token for column in (0, 1) for k in (pair[column] for pair in pairs)]
        prompt, longest = group.rendered.prompt, max(len(answer) for answer in answers)
        ids = np.zeros((len(answers), len(prompt) + longest), np.int64)
        real, completion = np.zeros_like(ids), np.zeros_like(ids)
        for row, answer in enumerate(answers):
            end = len(prompt) + len(answer)
            ids[row, :end] = np.concatenate([prompt, answer])
            real[row, :end] = 1
            completion[row, len(prompt) : end] = 1
        mean, std = (np.array(x, np.float32)[:, None, None] for x in (self._config.pixel_mean, self._config.pixel_std))
        pixels = (group.rendered.tiles.transpose(0, 3, 1, 2).astype(np.float32) / 255 - mean) / std
        tile = torch.from_numpy(pixels).to(self._dtype)
        batch = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(real),
            "completion_mask": torch.from_numpy(completion),
            "pixel_values": tile[None].repeat(len(answers), 1, 1, 1, 1),
            "image_sizes": torch.tensor([case.picture[::-1]] * len(answers)),
        }
        return {name: value.to(self._device) for name, value in batch.items()}

    def step(self) -> tuple[float, float, float]:
        self._model.zero_grad(set_to_none=True)
        self._wait()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began, total = time.perf_counter(), 0.0
        for share, batch in zip(self._share, self._batches, strict=True):
            with self._autocast():
                loss = self._trainer.compute_loss(self._model, batch) * share
            loss.backward()
            total += loss.item()
        self._wait()
        seconds = time.perf_counter() - began
        squares = (float(p.grad.double().square().sum()) for p in self._model.parameters() if p.grad is not None)
        return seconds, total, math.sqrt(math.fsum(squares))

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def device_peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else 0


def _lora_config(adapter: str | None) -> Any:
    """A new adapter of the same kind: TRL takes a model that has one already for its own reference."""
    if adapter is None:
        return None
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode = False
    return config


def _fill_adapter(model: Any, adapter: str) -> None:
    """The values of `adapter` in place of those PEFT drew. Raises ValueError where names do not fit."""
    from peft import load_peft_weights, set_peft_model_state_dict

    left: Any = set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
    unset = [name for name in left.missing_keys if "lora_" in name]
    if unset or left.unexpected_keys:
        raise ValueError(f"{adapter} does not fit: missing {unset[:3]}, surplus {left.unexpected_keys[:3]}")


def _silence() -> None:
    """Progress bars and notes about TRL's own defaults, between the lines of the table."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)

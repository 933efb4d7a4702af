"""The two sides of the step benchmark, each in a process of its own, so that neither's memory or threads count for the
other: ours, as a group or as separate pairs, and TRL's DPOTrainer on the same weights and tokens."""

from __future__ import annotations

import ctypes
import functools
import math
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mmrlhf_jax.batch import Entry
from mmrlhf_jax.benchmarks.machine import cores, measured_peak
from mmrlhf_jax.benchmarks.workload import Case, as_pairs, random_group
from mmrlhf_jax.command import CommandError
from mmrlhf_jax.models.llava_onevision.config import read_config
from mmrlhf_jax.training.recipe import ComputeConfig

Form = Literal["group", "pairs", "trl", "trl default"]
MULTIPLE = 64  # slots of our buckets; the training default of 128 serves attention kernels of accelerators


@dataclass(frozen=True)
class Settings:
    """`model` and `reference`: directories in the llava-hf layout. `pairs_at_once`: pairs TRL forwards in one batch."""

    model: str
    reference: str
    compute: ComputeConfig
    beta: float
    pairs_at_once: int


class Measured(NamedTuple):
    """One step: seconds, mean loss of the pairs, global norm of the gradients, most bytes held at once."""

    seconds: float
    loss: float
    gradient_norm: float
    peak_bytes: int


class Side:
    """A worker process: it is given a case, then takes one step a call."""

    def __init__(self, form: Form, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self.form = form
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, form, settings), daemon=True)
        self._process.start()
        there.close()

    def prepare(self, case: Case, pairs: Sequence[tuple[int, int]]) -> float:
        """Makes the case's batches; seconds until a first step was done, compilation included."""
        return self._ask((case, tuple(pairs)))

    def step(self) -> Measured:
        return self._ask("step")

    def matrix_rate(self) -> float:
        """FLOP/s of large matrix products in jax, on this side's device."""
        return self._ask("rate")

    def close(self) -> None:
        self._here.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _ask(self, what: Any) -> Any:
        try:
            self._here.send(what)
            answer = self._here.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise CommandError(
                f"the side {self.form!r} ended with exit code {self._process.exitcode}, as a process that asks for "
                "more memory than there is does; try a smaller case"
            ) from error
        if isinstance(answer, str):
            raise CommandError(f"the side {self.form!r} failed:\n{answer}")
        return answer


def _serve(connection: Connection, form: Form, settings: Settings) -> None:
    trl = form in ("trl", "trl default")
    # the sides share a GPU, of which jax would take three quarters at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    side: _Ours | _Trl | None = None
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        try:
            if asked == "rate":
                connection.send(measured_peak(settings.compute.dtype))
                continue
            if side is None:
                side = _Trl(settings, checkpointing=form == "trl default") if trl else _Ours(settings, form)
            if asked == "step":
                _forget_peak()
                seconds, loss, norm = side.step()
                connection.send(Measured(seconds, loss, norm, side.device_peak() or _peak()))
            else:
                began = time.perf_counter()
                side.prepare(*asked)
                side.step()
                connection.send(time.perf_counter() - began)
        except Exception:
            connection.send(traceback.format_exc())


class _Ours:
    """The gradient of DPO by the trainer's own `accumulate`, with an online reference."""

    def __init__(self, settings: Settings, form: Form):
        import jax

        from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh, replicated
        from mmrlhf_jax.objectives import DPO
        from mmrlhf_jax.training.model import load_model
        from mmrlhf_jax.training.recipe import INFERENCE, Recipe
        from mmrlhf_jax.training.runtime import set_up_jax
        from mmrlhf_jax.training.setup import compute_of
        from mmrlhf_jax.training.state import partition, trains
        from mmrlhf_jax.training.step import Sums, make_accumulate, make_zero_sums, metric_names

        set_up_jax(settings.compute.dtype)
        self._form, self._mesh = form, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        recipe = Recipe(objective=DPO(beta=settings.beta), compute=settings.compute)
        model = load_model(settings.model, self._mesh, recipe.sharding, rates=recipe.optimizer.rates)
        self._reference = load_model(settings.reference, self._mesh, recipe.sharding, rates=INFERENCE).params
        self._config = model.config
        self._trainable, self._frozen = partition(model.params, trains(recipe))
        shardings = Sums(jax.tree.map(lambda p: p.sharding, self._trainable), replicated(self._mesh))
        self._accumulate = make_accumulate(
            self._config, compute_of(recipe, self._mesh), recipe.objective, sums_sharding=shardings
        )
        names = metric_names(recipe.objective)
        self._zeros = make_zero_sums(self._trainable, names, sums_sharding=shardings)
        self._norm = jax.jit(lambda tree: sum(jax.numpy.vdot(g, g) for g in jax.tree.leaves(tree)))
        self._key = jax.device_put(jax.random.key(0), replicated(self._mesh))

    def prepare(self, case: Case, pairs: tuple[tuple[int, int], ...]) -> None:
        from mmrlhf_jax.batch import Totals, pack
        from mmrlhf_jax.groups import Bucket
        from mmrlhf_jax.training.runtime import to_devices

        groups = [random_group(self._config, case, seed) for seed in range(case.groups)]
        as_one = self._form == "group"
        batches = [groups] if as_one else [[pair] for group in groups for pair in as_pairs(group, pairs)]
        wins, scored = (
            sum(case.responses[i] for i, _ in pairs),
            sum(case.responses[k] for pair in pairs for k in pair),
        )
        n = case.groups
        totals = Totals(n * len(pairs), n * wins, n * (sum(case.responses) if as_one else scored), n)
        sizes = {"tokens_per_tile": self._config.tokens_per_tile, "tile_size": self._config.tower.image_size}

        def batch(entries: list[Entry]) -> Any:
            one = entries[0].rendered  # all are of one size
            lengths = [len(branch.token) for branch in one.branches]
            slots = _slots(sum(lengths) if as_one else max(lengths))
            bucket = Bucket(len(entries), len(one.tiles), _slots(len(one.prompt)), slots)
            return pack(entries, bucket, totals, responses=len(lengths), separate=not as_one, **sizes)

        self._batches = [to_devices(batch(entries), self._mesh) for entries in batches]

    def step(self) -> tuple[float, float, float]:
        import jax

        began, sums = time.perf_counter(), self._zeros()
        with jax.set_mesh(self._mesh):
            for batch in self._batches:
                sums, _ = self._accumulate(self._trainable, self._frozen, self._reference, sums, batch, self._key)
        jax.block_until_ready(sums)
        seconds = time.perf_counter() - began
        return seconds, float(sums.metrics["loss"]), math.sqrt(float(self._norm(sums.gradients)))

    def device_peak(self) -> int:
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


class _Trl:
    """TRL's DPOTrainer: its loss on batches as its collator makes them, and torch's backward. The tower is frozen, as
    ours is. `checkpointing` is TRL's default; without it a step is faster and holds more."""

    def __init__(self, settings: Settings, *, checkpointing: bool):
        import torch
        from datasets import Dataset
        from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
        from trl import DPOConfig, DPOTrainer

        _silence()
        torch.set_num_threads(cores())
        self._batch, self._config = settings.pairs_at_once, read_config(settings.model)
        self._dtype = getattr(torch, settings.compute.dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        load: Any = functools.partial(LlavaOnevisionForConditionalGeneration.from_pretrained, dtype=self._dtype)
        self._model, reference = (load(path).to(self._device) for path in (settings.model, settings.reference))
        self._model.model.vision_tower.requires_grad_(False)
        self._trainer = DPOTrainer(
            model=self._model,
            ref_model=reference,
            args=DPOConfig(
                output_dir=str(Path(settings.model).parent / "trl"),
                beta=settings.beta,
                max_length=None,
                bf16=False,  # the weights have their dtype already
                use_cpu=self._device == "cpu",
                gradient_checkpointing=checkpointing,
                report_to="none",
            ),
            # never looked at: batches are made below, so that no processor, hence no torchvision, is needed
            train_dataset=Dataset.from_list([{"prompt": "?", "chosen": "!", "rejected": "."}]),
            processing_class=AutoTokenizer.from_pretrained(settings.model),
        )
        self._model.train()

    def prepare(self, case: Case, pairs: tuple[tuple[int, int], ...]) -> None:
        if case.groups > 1:
            raise ValueError("TRL is timed on one group at a time")
        group, size = random_group(self._config, case), self._batch
        self._share = [len(pairs[i : i + size]) / len(pairs) for i in range(0, len(pairs), size)]
        self._batches = [self._inputs(group, case, pairs[i : i + size]) for i in range(0, len(pairs), size)]

    def _inputs(self, group: Entry, case: Case, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """What its DataCollatorForVisionPreference hands over: chosen answers, then rejected ones, padded right."""
        import torch

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
        import torch

        self._model.zero_grad(set_to_none=True)
        if self._device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began, total = time.perf_counter(), 0.0
        for share, batch in zip(self._share, self._batches, strict=True):
            loss = self._trainer.compute_loss(self._trainer.model, batch) * share
            loss.backward()
            total += loss.item()
        if self._device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        squares = (float(p.grad.double().square().sum()) for p in self._model.parameters() if p.grad is not None)
        return seconds, total, math.sqrt(math.fsum(squares))

    def device_peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if self._device == "cuda" else 0


def _silence() -> None:
    """Progress bars and notes about TRL's own defaults, between the lines of the table."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def _slots(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def _forget_peak() -> None:
    """The process's peak counts from here on (Linux; elsewhere it is of the whole process)."""
    if (trim := _malloc_trim()) is not None:
        trim(0)  # what was freed is no longer held
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


def _peak() -> int:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

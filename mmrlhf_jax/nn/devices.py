"""Accelerators: what one chip computes, holds and moves, as its maker states it.

What MFU divides by and what launch/plan.py plans with. Peaks are dense bf16 products (NVIDIA's sheets print twice that,
"with sparsity"); links are counted in one direction, where most sheets add up both.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One chip, which is one device to jax."""

    name: str
    bf16_flops: float
    """dense peak, FLOP/s"""
    memory: float
    """bytes a program can have. TPUs: what libtpu compiles into, a little less than the sheet says; GPUs: the sheet's
    GB as 1e9 bytes, which leaves room for the CUDA context (an H100 of 80 GB reports 79.6 GiB)"""
    bandwidth: float
    """of its own memory, bytes/s"""
    link: float
    """to the other chips of its slice or node, bytes/s in one direction, all links together"""
    network: float | None
    """a chip's share of the network between slices or nodes, bytes/s in one direction; None: no such machine is sold"""
    source: str

    @property
    def is_tpu(self) -> bool:
        return self.name in _TPU_KINDS.values()


_CLOUD = "docs.cloud.google.com/tpu/docs"
_TABLE = (
    # Peak and bandwidth: the page named. Memory: what libtpu 0.0.42 says it has (v4: twice 15.25 GiB). Links: half
    # of "bidirectional ICI bandwidth per chip". Network: "data center network bandwidth" per chip, or per pod of 256
    Accelerator(
        "v4", 275e12, 30.5 * GIB, 1200e9, 300e9, None, f"{_CLOUD}/v4; links: 6 of 50 GB/s, arXiv 2304.01433, table 1"
    ),
    Accelerator("v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 25e9 / 8, f"{_CLOUD}/v5e"),
    Accelerator("v5p", 459e12, 95.74 * GIB, 2765e9, 600e9, 50e9 / 8, f"{_CLOUD}/v5p-training"),
    Accelerator("v6e", 918e12, 31.25 * GIB, 1600e9, 400e9, 100e9 / 8, f"{_CLOUD}/v6e"),
    # network: of the maker's own server, one port a GPU
    Accelerator(
        "h100", 989.4e12, 80e9, 3350e9, 450e9, 50e9, "NVIDIA H100 datasheet (SXM); DGX H100 datasheet: 400 Gb/s ports"
    ),
    Accelerator("h200", 989.4e12, 141e9, 4800e9, 450e9, 50e9, "NVIDIA H200 datasheet (SXM); DGX H200: 400 Gb/s ports"),
    Accelerator(
        "a100", 312e12, 80e9, 2039e9, 300e9, 25e9, "NVIDIA A100 datasheet (SXM 80 GB); DGX A100: 200 Gb/s ports"
    ),
    Accelerator(
        "a100-40", 312e12, 40e9, 1555e9, 300e9, 25e9, "NVIDIA A100 datasheet (40 GB); DGX A100: 200 Gb/s ports"
    ),
    Accelerator(
        "rtx4090",
        165.2e12,
        24e9,
        1008e9,
        32e9,
        None,
        "NVIDIA Ada GPU architecture whitepaper, appendix A; PCIe 4.0 x16",
    ),
)
ACCELERATORS: dict[str, Accelerator] = {one.name: one for one in _TABLE}

# jax's `device_kind`; "TPU v5" is the v5p, and v4 and v5p chips are one device each
_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
              "TPU v6 lite": "v6e", "TPU v6e": "v6e"}  # fmt: skip
# the driver's names of the boards of the table; other boards of a family (PCIe, NVL) are slower and not listed
_GPU_KINDS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


def accelerator(device_kind: str) -> Accelerator | None:
    """The chip that jax calls `device_kind`; None for CPUs and whatever is not listed."""
    name = _TPU_KINDS.get(device_kind) or _GPU_KINDS.get(device_kind)
    return ACCELERATORS[name] if name else None

"""launch/benchmark.py where torchvision does not fit torch: the processes it starts run these first lines, too. Its mix
has the smaller pictures only: TRL takes minutes over one of 7,000 tokens on two cores."""

import importlib.util
from pathlib import Path

from torchvision_shim import mend_torchvision

from mmrlhf_jax.benchmarks import workload

mend_torchvision()
workload.PICTURES = {(336, 336): 0.75, (384, 200): 0.25}  # before anybody else reads it

if __name__ == "__main__":
    program = Path(__file__).resolve().parent.parent / "launch" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", program)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.run_command(benchmark.main)

"""launch/benchmark.py where torchvision does not fit torch: the processes it starts run these first lines, too."""

import importlib.util
from pathlib import Path

from torchvision_shim import mend_torchvision

mend_torchvision()

if __name__ == "__main__":
    program = Path(__file__).resolve().parent.parent / "launch" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", program)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.run_command(benchmark.main)

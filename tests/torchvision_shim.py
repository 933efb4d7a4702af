"""Lets transformers' image code load in a test environment whose torchvision does not fit its torch."""

import importlib
import importlib.util
import sys

_libraries = []  # declared operators live as long as their library object


def mend_torchvision() -> None:
    """Call before transformers' processors are imported.

    A torchvision built for another torch fails to import for want of two detection operators and takes transformers'
    processors with it, which use neither. Declaring their schemas is enough. Without torch, or with a torchvision that
    works, nothing happens.
    """
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision")):
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        torch = importlib.import_module("torch")
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]

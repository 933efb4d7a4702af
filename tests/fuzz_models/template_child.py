"""The child process of template_process.py with its lines noted: each is appended, when it first runs, to the file that
the environment variable FUZZ_MODELS_LINES names. A quarter of the renderings is traced."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

SOURCE = str(Path(__file__).parents[2] / "mmrlhf_jax" / "models" / "llava_onevision" / "template_process.py")
TRACED = 4


def serve() -> None:
    parts: dict[str, Any] = {"__name__": "template_process", "__file__": SOURCE}
    exec(compile(Path(SOURCE).read_text(), SOURCE, "exec"), parts)
    notes = os.open(os.environ["FUZZ_MODELS_LINES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    seen: set[int] = set()
    answer, turn = parts["_answer"], 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lineno not in seen:
            seen.add(frame.f_lineno)
            os.write(notes, f"{SOURCE}\t{frame.f_lineno}\n".encode())
        return local

    def called(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename == SOURCE else None

    def traced(*arguments: Any) -> Any:
        nonlocal turn
        turn += 1
        sys.settrace(called if turn % TRACED == 0 else None)
        try:
            return answer(*arguments)
        finally:
            sys.settrace(called)  # of `serve` itself

    parts["_answer"] = traced
    sys.settrace(called)
    parts["serve"]()


if __name__ == "__main__":
    serve()

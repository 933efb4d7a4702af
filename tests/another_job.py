"""A job on another host that writes an output: it renews the lease."""

import contextlib
import dataclasses
import json
import threading
import time

from etils import epath

from mmrlhf_jax.lease import Holder
from mmrlhf_jax.storage import write_whole


@contextlib.contextmanager
def held(file):
    """Another host renews its lease."""
    ended, started = threading.Event(), time.time()

    def write():
        holder = Holder("theirs", "elsewhere", 7, "another boot", 1, started, time.time())
        write_whole(epath.Path(file), json.dumps(dataclasses.asdict(holder)).encode())

    def beat():
        while not ended.wait(0.5):
            write()

    write()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        file.unlink()

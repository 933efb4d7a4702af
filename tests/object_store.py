"""A Google Cloud Storage of one's own on the loopback interface, for tests of gs:// paths."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer
from typing import Any

import pytest

BUCKET = "bucket"


class _Server(HTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up before it has read everything is no news."""


@contextmanager
def object_store() -> Iterator[None]:
    """While it runs, gs:// of this process and its children is an emulator with one bucket.

    gcsfs and tensorstore (orbax) read these variables when first used, so a session has one emulator.
    """
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # else it asks Google itself what kind of bucket this is
    pytest.importorskip("gcsfs", reason="needs gcsfs: pip install -e '.[test]'")
    pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator: pip install -e '.[test]'")
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    storage = Storage(use_memory_fs=True)
    create_bucket(BUCKET, storage)
    server = _Server(("127.0.0.1", 0), partial(RequestHandler, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = url
    yield
    server.shutdown()
    server.server_close()

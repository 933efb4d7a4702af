"""A Google Cloud Storage of one's own on the loopback interface, for tests of gs:// paths."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from typing import Any

import pytest

BUCKET = "bucket"


class _Server(HTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up before it has read everything is no news."""


def _answer_as_google_does() -> None:
    """What the emulator leaves out and orbax' store relies on: the generation of what is read, and refusing to
    overwrite another generation than the one stated (https://cloud.google.com/storage/docs/request-preconditions)."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    plain_download, plain_insert = objects.download, objects.insert

    def generation(storage: Any, bucket: str, name: str) -> str:
        try:
            return str(storage.get_file_obj(bucket, name)["generation"])
        except NotFound:
            return "0"

    def download(request: Any, response: Any, storage: Any, *more: Any, **named: Any) -> None:
        plain_download(request, response, storage, *more, **named)
        if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            of = generation(storage, request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = of

    def insert(request: Any, response: Any, storage: Any, *more: Any, **named: Any) -> Any:
        (wanted, *_), (name, *_) = (request.query.get(key, [""]) for key in ("ifGenerationMatch", "name"))
        if wanted and not name and request.query["uploadType"] == ["multipart"]:
            name = request.data["meta"]["name"]
        if wanted and name and wanted != generation(storage, request.params["bucket_name"], name):
            _ = request.data  # read, or the connection is out of step
            response.status = HTTPStatus.PRECONDITION_FAILED
            return None
        return plain_insert(request, response, storage, *more, **named)

    objects.download, objects.insert = download, insert
    ours = {plain_download: download, plain_insert: insert}
    for _, methods in server.HANDLERS:
        methods.update({verb: ours[handler] for verb, handler in methods.items() if handler in ours})


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
    _answer_as_google_does()
    storage = Storage(use_memory_fs=True)
    create_bucket(BUCKET, storage)
    server = _Server(("127.0.0.1", 0), partial(RequestHandler, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = url
    yield
    server.shutdown()
    server.server_close()

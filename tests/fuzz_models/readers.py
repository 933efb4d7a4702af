"""The readers of MODEL and RUN directories."""

from __future__ import annotations

from fuzz_models import config_readers, run_readers, text_readers, weight_readers

READERS = {
    reader.name: reader
    for readers in (weight_readers, config_readers, text_readers, run_readers)
    for reader in readers.READERS
}

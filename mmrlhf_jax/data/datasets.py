"""A DATASET as programs take it: one that launch/prepare.py wrote, or a mixture file that names several."""

from __future__ import annotations

import os

from mmrlhf_jax import storage
from mmrlhf_jax.data.dataset import DatasetError, PreparedDataset
from mmrlhf_jax.data.mixture import MixedDataset, open_mixture

Dataset = PreparedDataset | MixedDataset


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """The dataset that `launch/prepare.py --output PATH` wrote, or the mixture that the JSON file at `path` describes.

    Raises:
        DatasetError: there is none, or it is damaged.
        MixtureError: the file describes no mixture.
    """
    name = os.fspath(path)
    place = storage.to_path(name)
    if not place.exists():
        raise DatasetError(
            f"{name} does not exist: a dataset is a directory made by launch/prepare.py, or a mixture file"
        )
    return open_mixture(name, PreparedDataset) if place.is_file() else PreparedDataset(name)

"""A DATASET as programs take it: one that launch/prepare.py wrote, or a mixture file that names several."""

from __future__ import annotations

import os

from etils import epath

from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.mixture import MixedDataset, open_mixture

Dataset = PreparedDataset | MixedDataset


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """The dataset that `launch/prepare.py --output PATH` wrote, or the mixture that the JSON file at `path` describes.

    Raises:
        DatasetError: there is none, or it is damaged.
        MixtureError: the file describes no mixture.
    """
    name = os.fspath(path)
    return open_mixture(name, PreparedDataset) if epath.Path(name).is_file() else PreparedDataset(name)

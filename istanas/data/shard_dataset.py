"""The data set "webdataset" (alias "shards"): pictures in tar files with an index, in a folder or in a bucket.

With the same pictures, it gives the same batches, bit for bit, as the picture folder from which it was packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from istanas.data.folder_dataset import dataset_of
from istanas.data.folders import Listing, count_of
from istanas.data.image_dataset import ImageDataset
from istanas.data.request import DatasetRequest
from istanas.data.shard_files import Members, storage_at
from istanas.data.shard_index import read_index
from istanas.data.survey import Survey


@dataclass(frozen=True)
class _ShardListing(Listing):
    """The pictures in shards. Each name begins with the folder or address of the shards; `files` adds no folder.

    Args:
        address: The address of the bucket; None for a folder.
    """

    address: str | None = None

    @property
    def place(self) -> str:
        """Return the address, or the real path of the folder."""
        return super().place if self.address is None else self.address.rstrip("/")

    @property
    def prefix(self) -> str:
        """Return the beginning of the names."""
        return f"{self.root if self.address is None else self.address}/"

    @cached_property
    def files(self) -> Sequence[str]:
        """Return the names of the pictures."""
        return self.paths


def survey(request: DatasetRequest, keep: bool = True) -> Survey:
    """Return the facts about the pictures, which the index contains. Nothing is cached, whatever `keep` is."""
    return _opened(request)[0]


def load_shards(request: DatasetRequest) -> ImageDataset:
    """Load a data set of shards."""
    facts, members = _opened(request)
    return dataset_of(request, facts, members)


def _opened(request: DatasetRequest) -> tuple[Survey, Members]:
    root = request.address if request.address is not None else str(request.root)
    storage = storage_at(root)
    index = read_index(storage)
    names = index.names(root)
    listing = _ShardListing(
        root=Path(root),
        class_names=index.class_names,
        paths=names,
        labels=torch.from_numpy(index.samples["label"].astype(np.int64)),
        n_train=index.n_train,
        state=index.digest,
        left_out=(),
        kind=request.name,
        read_from=count_of(len(index.shards), "shard"),
        address=request.address,
    )
    return Survey(listing, index.facts), Members(storage, index.shard_names, index.samples, names)

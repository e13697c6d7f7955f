"""The data set "folder": pictures in `train/CLASS/*` and `test/CLASS/*` (or `val/CLASS/*`), or in `CLASS/*`.

Small pictures are decoded once into an array, which is cached; large ones stay in their files.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from istanas.data.arrays import array_dataset
from istanas.data.cache import read_cache, sha256, write_cache
from istanas.data.folders import Listing
from istanas.data.image_dataset import ArrayPictures, FilePictures, ImageDataset, pictures_digest
from istanas.data.pool import DEFAULT_POOL, Pool
from istanas.data.preprocessing import Resize
from istanas.data.reading import DecodeSettings, decode_pictures
from istanas.data.request import DatasetRequest
from istanas.data.shard_files import Members
from istanas.data.survey import Survey, cache_file, survey_folder
from istanas.limits import SMALL_SIDE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CACHE_VERSION = 3


def load_folder(request: DatasetRequest) -> ImageDataset:
    """Load a picture folder."""
    return dataset_of(request, survey(request))


def dataset_of(request: DatasetRequest, facts: Survey, members: Members | None = None) -> ImageDataset:
    """Return the data set of pictures whose headers are known.

    Args:
        request: The request.
        facts: The facts in the headers.
        members: The contents of the pictures if they do not lie in files of their own.
    """
    size = facts.side(request.image_size)
    facts.shape(request.image_size)  # raises on unequal sizes before any picture is decoded
    settings = facts.decode_settings(request.background)
    if size is not None and size > SMALL_SIDE:
        return _file_dataset(request, facts, size, settings, members)
    listing, n = facts.listing, facts.listing.n_train
    images = torch.from_numpy(_cached_pictures(request, listing, settings, members))
    dataset = array_dataset(
        request.name,
        listing.class_names,
        *(
            # The paths of a folder are relative already; those of shards begin as its `files` do.
            ArrayPictures(
                images[part],
                listing.labels[part],
                listing.paths[part],
                "" if members is None else listing.prefix,
            )
            for part in (slice(n), slice(n, None))
        ),
    )
    notes = tuple(facts.notes(request.image_size, settings))
    resize: Resize = "none" if size is None else "fit"
    return replace(dataset, resize=resize, decode_settings=settings, notes=notes)


def survey(request: DatasetRequest, keep: bool = True) -> Survey:
    """Return the facts in the headers of a picture folder; `keep` says whether they are written to the cache."""
    assert request.root is not None, "checked by `load_dataset`"
    return survey_folder(
        request.root,
        cache_dir=request.cache_dir,
        allow_left_out=request.allow_left_out,
        progress=request.checking,
        test_fraction=request.test_fraction,
        keep=keep,
        given=request.given,
    )


def _file_dataset(
    request: DatasetRequest, facts: Survey, size: int, settings: DecodeSettings, members: Members | None
) -> ImageDataset:
    """Return the data set of pictures that stay in their files or shards."""
    listing, n = facts.listing, facts.listing.n_train
    prints = facts.facts["fingerprint"]
    train, test = (
        FilePictures(
            listing.files[part],
            listing.labels[part],
            size,
            prints[part].tobytes(),
            settings,
            None if members is None else members[part],
            listing.prefix,
        )
        for part in (slice(n), slice(n, None))
    )
    digests = [pictures_digest(part, torch.arange(len(part)), listing.class_names) for part in (train, test)]
    return ImageDataset(
        name=request.name,
        class_names=listing.class_names,
        train=train,
        test=test,
        channels=3,
        height=size,
        width=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        digest=sha256(json.dumps(digests).encode()),
        train_digest=digests[0],
        decode_settings=settings,
        notes=tuple(facts.notes(request.image_size, settings)),
    )


def _cached_pictures(
    request: DatasetRequest, listing: Listing, settings: DecodeSettings, members: Members | None
) -> NDArray[np.uint8]:
    """Return the decoded pictures (N, C, H, W), from the cache if it matches their current state."""
    state = f"{_CACHE_VERSION} {request.image_size} {settings.cache_key()} {listing.state}"
    file = cache_file(request.cache_dir, listing.place, "pictures", request.image_size)
    images = read_cache(file, state)
    if images is None:
        # The client of a bucket cannot be used in a forked process.
        pool = Pool(processes=1) if members is not None and members.is_remote else DEFAULT_POOL
        sources = listing.files if members is None else members
        images = decode_pictures(sources, request.image_size, settings, request.progress, pool=pool)
        write_cache(file, state, images)
    return images

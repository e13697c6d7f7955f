"""Image data: data sets by name, stratified splits, batched augmentation, reproducible loading."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from istanas.data.arrays import dataset_from_arrays
    from istanas.data.augmentation import Augmentation, augment, cutout, normalize, random_crop, random_flip
    from istanas.data.image_dataset import (
        ArrayPictures,
        FilePictures,
        ImageDataset,
        Pictures,
        pictures_digest,
    )
    from istanas.data.loading import Batch, BatchLoader, batches
    from istanas.data.preprocessing import Preprocessing
    from istanas.data.reading import DecodeSettings
    from istanas.data.registry import DATASETS, DatasetEntry, load_dataset, register_dataset
    from istanas.data.request import DatasetRequest
    from istanas.data.splits import stratified_split, stratified_subset
    from istanas.data.survey import Survey, survey_folder

_MODULES = {
    "arrays": ("dataset_from_arrays",),
    "augmentation": ("Augmentation", "augment", "cutout", "normalize", "random_crop", "random_flip"),
    "image_dataset": ("ArrayPictures", "FilePictures", "ImageDataset", "Pictures", "pictures_digest"),
    "loading": ("Batch", "BatchLoader", "batches"),
    "preprocessing": ("Preprocessing",),
    "reading": ("DecodeSettings",),
    "registry": ("DATASETS", "DatasetEntry", "load_dataset", "register_dataset"),
    "request": ("DatasetRequest",),
    "splits": ("stratified_split", "stratified_subset"),
    "survey": ("Survey", "survey_folder"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DATASETS",
    "ArrayPictures",
    "Augmentation",
    "Batch",
    "BatchLoader",
    "DatasetEntry",
    "DatasetRequest",
    "DecodeSettings",
    "FilePictures",
    "ImageDataset",
    "Pictures",
    "Preprocessing",
    "Survey",
    "augment",
    "batches",
    "cutout",
    "dataset_from_arrays",
    "load_dataset",
    "normalize",
    "pictures_digest",
    "random_crop",
    "random_flip",
    "register_dataset",
    "stratified_split",
    "stratified_subset",
    "survey_folder",
]


def __getattr__(name: str) -> Any:
    """Import a name from its module at its first use: a configuration needs the registry, but not torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value

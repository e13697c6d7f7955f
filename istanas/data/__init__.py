"""Pictures: data sets by name, stratified splits, batched augmentation, reproducible loading."""

from istanas.data.augment import Augmentation, augment, cutout, normalize, random_crop, random_flip
from istanas.data.datasets import (
    DATASETS,
    ArrayPictures,
    FilePictures,
    ImageDataset,
    Pictures,
    load_dataset,
    pictures_digest,
    stratified_split,
    stratified_subset,
)
from istanas.data.folders import Survey, survey_folder
from istanas.data.loading import Batch, BatchLoader, batches
from istanas.data.reading import Reading

__all__ = [
    "DATASETS",
    "ArrayPictures",
    "Augmentation",
    "Batch",
    "BatchLoader",
    "FilePictures",
    "ImageDataset",
    "Pictures",
    "Reading",
    "Survey",
    "augment",
    "batches",
    "cutout",
    "load_dataset",
    "normalize",
    "pictures_digest",
    "random_crop",
    "random_flip",
    "stratified_split",
    "stratified_subset",
    "survey_folder",
]

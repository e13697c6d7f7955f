"""Image data: data sets by name, stratified splits, batched augmentation, reproducible loading."""

from istanas.data.augment import Augmentation, augment, cutout, normalize, random_crop, random_flip
from istanas.data.folders import Survey, survey_folder
from istanas.data.image_dataset import ArrayPictures, FilePictures, ImageDataset, Pictures, pictures_digest
from istanas.data.loading import Batch, BatchLoader, batches
from istanas.data.reading import DecodeSettings
from istanas.data.registry import DATASETS, load_dataset
from istanas.data.splits import stratified_split, stratified_subset

__all__ = [
    "DATASETS",
    "ArrayPictures",
    "Augmentation",
    "Batch",
    "BatchLoader",
    "DecodeSettings",
    "FilePictures",
    "ImageDataset",
    "Pictures",
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

"""Images as files, arrays and pictures."""

from ldm_dkdm.images.folders import count_images, find_images, folder_of_images, images_beside, load_images
from ldm_dkdm.images.pixels import (
    FORMATS,
    GRID,
    MODES,
    SAMPLED,
    SUFFIXES,
    opened_image,
    read_image,
    read_images,
    to_signed,
    to_uint8,
)
from ldm_dkdm.images.sheets import grid, save_image, side_by_side, to_image

__all__ = [
    "FORMATS",
    "GRID",
    "MODES",
    "SAMPLED",
    "SUFFIXES",
    "count_images",
    "find_images",
    "folder_of_images",
    "grid",
    "images_beside",
    "load_images",
    "opened_image",
    "read_image",
    "read_images",
    "save_image",
    "side_by_side",
    "to_image",
    "to_signed",
    "to_uint8",
]

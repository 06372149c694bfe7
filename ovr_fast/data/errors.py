"""Errors of data sets."""

from ovr_fast.errors import OVRFastError


class DataError(OVRFastError, ValueError):
    """A data set that cannot be read. The message names file and line, and how to mend it."""


class ImageError(DataError):
    """An image is missing, cannot be decoded, or is refused by the image processor."""

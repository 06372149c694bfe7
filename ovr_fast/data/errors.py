"""Errors of data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ovr_fast.errors import OVRFastError


class DataError(OVRFastError, ValueError):
    """A data set that cannot be read. The message names file and line, and how to mend it."""

    def __init__(self, message: str) -> None:
        # What a row holds may be in it, and half a character cannot be printed.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class AnswerColumnError(DataError):
    """A row's answer is none, or one that no response could match."""


class ImageError(DataError):
    """An image is missing, cannot be decoded, or is refused by the image processor."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one DataError that names the row: nothing that a row may
    hold ends a command with a traceback."""
    try:
        yield
    except DataError as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error
    except OVRFastError:
        raise
    except Exception as error:
        raise DataError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error

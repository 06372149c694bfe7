"""The base of the project's own errors."""


class OVRFastError(Exception):
    """What a user can mend: the message names the thing and how, and is all that a command prints.
    Any other exception is a defect and keeps its traceback."""

    together = False
    """Every rank has this error, at the same place: what they do next may be a collective."""


class ModelError(OVRFastError, ValueError):
    """A model folder that cannot be used."""


class SaveError(OVRFastError, OSError):
    """A file or folder that could not be written; nothing half-written remains."""

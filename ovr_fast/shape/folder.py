"""Where a model's folder is: on disk, on the hub, or, for its shape alone, in this package."""

from __future__ import annotations

from pathlib import Path

from ovr_fast.errors import ModelError

PUBLISHED = Path(__file__).parent / "published"
"""config.json of the published sizes, so that a plan can be made before the weights are here."""


def find_model(path: str, *, published_shape_is_enough: bool = False) -> Path:
    """The local folder of a model: the path itself, or a hub name's downloaded snapshot.

    Args:
        path: folder, or a name such as "Qwen/Qwen2.5-VL-7B-Instruct".
        published_shape_is_enough: do not fetch weights; the shape that ships here will do.

    Raises:
        ModelError: neither a folder nor a model that can be fetched.
    """
    if Path(path).is_dir():
        return Path(path)
    shipped = PUBLISHED / path.split("/")[-1]
    if published_shape_is_enough and shipped.is_dir():
        return shipped
    if path.count("/") != 1 or path.startswith((".", "/")):
        raise ModelError(f"model.path={path!r} is not a folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt"])
        )
    except Exception as error:  # the hub client raises many types, all meaning "not to be had"
        raise ModelError(
            f"model.path={path!r} is neither a folder nor a model that the hub gave "
            f"({type(error).__name__}: {error})"
        ) from error

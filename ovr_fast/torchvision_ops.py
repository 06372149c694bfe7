"""Lets torchvision import beside a CPU build of torch when only its CUDA build can be had.

torchvision's Python layer registers shape functions for the operators of its compiled ``_C``
library when it is imported. Where that library cannot be loaded, the import dies with "operator
torchvision::nms does not exist" and takes transformers' Qwen2.5-VL with it. Declaring the schemas
of the two operators that are named at import time is enough: nothing here calls them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path


def declare_if_broken() -> bool:
    """Declare ``torchvision::nms`` and ``qnms`` if torchvision's library cannot be loaded.

    Must run before torchvision is first imported. Returns True if the schemas were declared;
    does nothing where torchvision is absent or works.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    package = Path(next(iter(spec.submodule_search_locations)))
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = package / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(str(library))
            except OSError:
                break  # built for another torch: the declarations below stand in
            return False
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou) -> Tensor")
    return True

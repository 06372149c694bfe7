"""Runs first in every interpreter of a rollout server (its folder is put on PYTHONPATH).

vLLM starts interpreters of its own (engine core, model registry), and each of them imports
torchvision before any plug-in is loaded; see ``ovr_fast.torchvision_ops``.
"""

import importlib.util

if importlib.util.find_spec("torchvision") is not None:
    from ovr_fast.torchvision_ops import declare_if_broken

    declare_if_broken()

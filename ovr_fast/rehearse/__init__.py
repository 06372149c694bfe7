"""A training run on pretended GPUs: the real trainer, real CUDA builds, and cards that compute
nothing. ``python -m ovr_fast.rehearse``; nobody imports it."""

"""A server's own list of its weights: vLLM's workers are given this method, and the trainer asks
for it before it sends a byte (``engine_weights`` says what it must be)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def form_of(shape: torch.Size, dtype: torch.dtype) -> str:
    """Type and shape, as both sides write them: ``float32 [256, 64]``."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


class WeightManifest:
    """What vLLM adds to its worker class (``--worker-extension-cls``)."""

    model_runner: Any
    _weight_checksum_prefix: Any

    def weight_manifest(self) -> dict[str, str]:
        """The form of each parameter of this worker that a sync fills, by the names of
        ``/weight_checker``. What the engine keeps in another form once it is loaded (a CPU's
        products) is listed as it is loaded."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        model, prefix = self.model_runner.get_model(), self._weight_checksum_prefix()
        forms = {}
        for name, parameter in model.named_parameters():
            layer, _, own = name.rpartition(".")
            loaded, _ = get_layerwise_info(model.get_submodule(layer)).restore_metadata
            if own == "bias":  # not among them; some CPU products keep theirs in fp32
                dtype = loaded.get("weight", parameter).dtype
            else:
                parameter = loaded.get(own, parameter)
                dtype = parameter.dtype
            forms[prefix + name] = form_of(parameter.shape, dtype)
        return forms

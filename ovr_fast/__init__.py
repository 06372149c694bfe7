"""ovr_fast: the open training system for the Open Vision Reasoner recipe."""

import warnings

# What Megatron-core and torch say on every start, about packages we do not use and about
# Megatron's own calls: a newcomer's first screen should be the run.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    ".*nvidia-modelopt.*",
    "full scope is deprecated",
    "When using async grad allreduce",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.* is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)

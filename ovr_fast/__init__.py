"""ovr_fast: the open training system for the Open Vision Reasoner recipe."""

import warnings

# Megatron-core tells at import that Transformer Engine, Apex and modelopt are missing. We use none
# of them, and a newcomer's first screen should not be four warnings about that.
for _message in (
    "Transformer Engine and Apex are not installed",
    ".*nvidia-modelopt.*",
    "full scope is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)

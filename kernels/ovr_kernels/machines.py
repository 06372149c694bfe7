"""GPUs as the model of the kernels sees them."""

from __future__ import annotations

import re
from dataclasses import dataclass

PRODUCT = {80: 2048, 90: 4096, 100: 8192}
"""Operations a cycle of a multiprocessor's matrix unit, 16-bit operands."""

LANES = {
    80: {"fma": 64, "multiply": 64, "alu": 64, "special": 16, "memory": 32},
    90: {"fma": 128, "multiply": 64, "alu": 64, "special": 16, "memory": 32},
    100: {"fma": 128, "multiply": 64, "alu": 64, "special": 16, "memory": 32},
}
"""Lanes of a multiprocessor, a cycle, by unit (CUDA programming guide, throughput of native
arithmetic instructions). Two floats in one instruction, as sm_100 has them, count as one."""

LATENCY = 800.0
"""Cycles from a load to its operand, assumed: L2 or HBM, and the barriers around it."""

OPERATIONS_REACHED, BYTES_REACHED = 800 / 989, 3.0 / 3.35
"""The floor: what of its data sheet an H100 reaches, and is assumed of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A GPU, by its data sheet."""

    name: str  # a word of what torch calls it
    capability: int
    multiprocessors: int
    peak: float  # operations a second, 16-bit operands, no sparsity
    bandwidth: float  # bytes a second

    @property
    def clock(self) -> float:
        """Cycles a second at which the peak is the peak."""
        return self.peak / (self.multiprocessors * PRODUCT[self.capability])

    @property
    def operations(self) -> float:
        """A second, of the floor."""
        return self.peak * OPERATIONS_REACHED

    @property
    def bytes(self) -> float:
        """A second, of the floor."""
        return self.bandwidth * BYTES_REACHED


A100 = Machine(
    name="A100", capability=80, multiprocessors=108, peak=312e12, bandwidth=2.039e12,
)  # fmt: skip
H100 = Machine(
    name="H100", capability=90, multiprocessors=132, peak=989e12, bandwidth=3.35e12,
)  # fmt: skip
H200 = Machine(
    name="H200", capability=90, multiprocessors=132, peak=989e12, bandwidth=4.8e12,
)  # fmt: skip
B200 = Machine(
    name="B200", capability=100, multiprocessors=148, peak=2250e12, bandwidth=8.0e12,
)  # fmt: skip
MACHINES = (A100, H100, H200, B200)  # the 80 GB form of the first, all as SXM modules


_OTHER_FORMS = {"PCIe", "PCIE", "NVL", "40GB", "MIG"}


def machine_of(device: str) -> Machine | None:
    """By torch's name of a device; None: not one of those, or another form of it."""
    words = set(re.split(r"\W", device))
    return next(
        (each for each in MACHINES if each.name in words and not words & _OTHER_FORMS), None
    )

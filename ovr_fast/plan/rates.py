"""What hardware reaches, with where each figure is from: ``rates.toml`` or a file like it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovr_fast.settings import ConfigError

SHIPPED = Path(__file__).with_name("rates.toml")
NAMES = (
    "products_tflops", "attention_forward_tflops", "attention_training_tflops", "hbm_gb_s",
    "decode_share", "decode_latency_ms", "allreduce_us", "prefill_tflops", "nvlink_gb_s",
    "network_gb_s", "pcie_gb_s", "memory_gib",
)  # fmt: skip
COSTS = ("decode_latency_ms", "allreduce_us")
"""Rates of which less is better."""

End = Literal["value", "slow", "fast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One figure and its interval."""

    value: float
    low: float
    high: float
    source: str


@dataclass(frozen=True, slots=True)
class Rates:
    """All of a kind of GPU."""

    kind: str
    rates: dict[str, Rate]

    def at(self, end: End) -> dict[str, float]:
        """Every rate: its value, or all at the end where a run is slowest or fastest."""
        if end == "value":
            return {name: rate.value for name, rate in self.rates.items()}
        return {
            name: rate.low if (end == "slow") != (name in COSTS) else rate.high
            for name, rate in self.rates.items()
        }


def read_rates(kind: str, path: Path = SHIPPED) -> Rates:
    """The rates of a kind of GPU.

    Raises:
        ConfigError: the file cannot be read, has no such kind, or lacks a rate.
    """
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"rates {path}: {error}") from error
    if kind not in table:
        raise ConfigError(
            f"no rates of {kind!r} in {path}, which has {', '.join(table)}; copy one, put in what "
            "your GPU reaches (benchmarks/report.py, benchmarks/gpu_step.py), and pass --rates FILE"
        )
    found = {}
    for name in NAMES:
        row = table[kind].get(name)
        try:
            rate = Rate(**row)
        except TypeError as error:
            raise ConfigError(
                f"{path}: {kind}.{name} must have value, low, high, source"
            ) from error
        if not 0 < rate.low <= rate.value <= rate.high:
            raise ConfigError(f"{path}: {kind}.{name} must have 0 < low <= value <= high")
        found[name] = rate
    return Rates(kind, found)

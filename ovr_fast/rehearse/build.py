"""Compiles ``card/`` beside a CUDA build of torch: the libraries that stand in for NVIDIA's."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ovr_fast.errors import OVRFastError

SOURCES = Path(__file__).parent / "card"
RUNTIME = ("runtime.c", "memory.c", "collectives.c")
# Whose missing symbols are NVIDIA's libraries, by the prefixes of these.
TORCH_LIBRARIES = (
    "libtorch_cuda.so",
    "libc10_cuda.so",
    "libtorch_cuda_linalg.so",
    "libtorch_python.so",
)
NVIDIA_SYMBOL = re.compile(r" U ((?:cuda|cublas|cudnn|nccl|cusparse|cusolver|curand|cufft)\w+)")


CUDART_VERSION = re.compile(r"#define CUDART_VERSION\s+(\d+)")


class NoCard(OVRFastError, RuntimeError):
    """The pretended card cannot be built here."""


def cuda_include(wanted: str) -> list[Path]:
    """Where the headers of CUDA ``wanted`` ("13") are: cuda.h in the first folder (of NVIDIA's
    wheel, Triton's, or a CUDA toolkit), what it includes in the others.

    Headers of another CUDA declare other functions under the same names (Triton 3.6 carries those
    of 12.8, and the torch 2.11 that brings it is built for 13.0).

    Raises:
        NoCard: there is none.
    """
    import torch
    import triton

    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    packages = Path(torch.__file__).parents[1]
    places = (
        packages / f"nvidia/cu{wanted}/include",
        packages / "nvidia/cuda_runtime/include",
        Path(triton.__file__).parent / "backends/nvidia/include",
        toolkit / "include",
    )
    for place in places:
        if (place / "cuda.h").exists() and (place / "cuda_runtime_api.h").exists():
            version = CUDART_VERSION.search((place / "cuda_runtime_api.h").read_text())
            if version and str(int(version[1]) // 1000) == wanted:
                return [place, *(other for other in places if other != place)]
    raise NoCard(
        f"no headers of CUDA {wanted}, which torch is built for, in "
        f"{', '.join(map(str, places))}; install nvidia-cuda-runtime=={wanted}.*"
    )


def card_libraries() -> Path:
    """The folder with ``libpretended.so``, ``libcuda.so.1`` and ``libnvidia-ml.so.1``, compiled by
    the first call and kept in the user's cache.

    Raises:
        NoCard: torch is a CPU build, or there is no compiler, headers or nm.
    """
    import torch

    if torch.version.cuda is None:
        raise NoCard(
            f"torch {torch.__version__} is a CPU build; a rehearsal runs torch's CUDA build: "
            "make rehearse (it installs requirements/gpu.txt into .venv-gpu)"
        )
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise NoCard(f"{tool} is not on the PATH; install gcc and binutils")
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ovr_fast"
    folder = cache / f"card-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as place:
            _compile(
                Path(place),
                Path(torch.__file__).parent / "lib",
                cuda_include(torch.version.cuda.split(".")[0]),
            )
            Path(place).chmod(0o755)
            Path(place).rename(folder)  # there whole, or not at all
    return folder


def _compile(out: Path, torch_library: Path, includes: list[Path]) -> None:
    wanted: set[str] = set()
    for name in TORCH_LIBRARIES:
        if (torch_library / name).exists():
            command = ["nm", "-D", "--undefined-only", str(torch_library / name)]
            wanted |= set(NVIDIA_SYMBOL.findall(_run(command)))
    runtime_header = (includes[0] / "cuda_runtime_api.h").read_text()
    driver_header = (includes[0] / "cuda.h").read_text()
    wanted |= set(re.findall(r"cudaError_t\s+CUDARTAPI\s+(cuda\w+)\s*\(", runtime_header))
    runtime = [SOURCES / name for name in RUNTIME]
    _stubs(wanted, runtime, out / "rest_of_runtime.c")
    names = set(re.findall(r"CUresult\s+CUDAAPI\s+(cu\w+)\s*\(", driver_header))
    names |= set(re.findall(r"#define\s+cu\w+\s+(cu\w+_v\d\w*)", driver_header))
    _stubs(names, [SOURCES / "driver.c"], out / "rest_of_driver.c")
    version = CUDART_VERSION.search(runtime_header)
    assert version is not None
    # Under the runtime's own name and symbol version, so that the real one is not loaded beside it.
    soname = f"libcudart.so.{int(version[1]) // 1000}"
    script = out / "versions"
    script.write_text(f"{soname} {{ global: cuda*; __cuda*; }};\n")
    gcc = ["gcc", "-shared", "-fPIC", "-O1", "-w", *(f"-I{place}" for place in includes)]
    _run(
        [
            *gcc,
            f"-Wl,-soname,{soname}",
            f"-Wl,--version-script={script}",
            "-o",
            str(out / "libpretended.so"),
            *map(str, runtime),
            str(out / "rest_of_runtime.c"),
            "-ldl",
            "-lpthread",
            "-lrt",
        ]  # fmt: skip
    )
    for soname, sources in (
        ("libcuda.so.1", [SOURCES / "driver.c", out / "rest_of_driver.c"]),
        ("libnvidia-ml.so.1", [SOURCES / "management.c"]),
    ):
        files = map(str, sources)
        _run([*gcc, f"-Wl,-soname,{soname}", "-o", str(out / soname), *files, "-ldl"])


def _stubs(names: set[str], sources: list[Path], target: Path) -> None:
    """A function that returns 0 for every name that the sources do not define."""
    text = "".join(source.read_text() for source in sources)
    own = set(re.findall(r"\b((?:cu|nccl)\w+)\(", text))
    own |= set(re.findall(r"(?:SUCCEEDS|MATRIX_PRODUCT)\((\w+)", text))
    lines = [
        f"__attribute__((weak)) int {name}(void) {{ return 0; }}" for name in sorted(names - own)
    ]
    target.write_text("\n".join(lines) + "\n")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoCard(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout

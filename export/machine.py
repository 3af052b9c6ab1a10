"""What engines are built for and with: a GPU architecture, and versions of libraries."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import torch

from tcc.errors import BundleError, ExportError

__all__ = [
    "Machine",
    "arch_of",
    "check_arch",
    "gpu_arch",
    "processor",
    "refuse_other",
    "refuse_processor",
    "versions",
]

#: What torch calls processors, each with the instructions of those before it.
_LEVELS = ("DEFAULT", "AVX2", "AVX512")


@dataclass(frozen=True)
class Machine:
    """What graphs are made for and with.

    Attributes:
        arch: the GPU architecture, such as `sm89`; "" where any device runs them.
        tools: the versions of what makes them.
    """

    arch: str
    tools: dict[str, str]


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def check_arch(arch: str) -> None:
    """Raise where `arch` does not name a GPU architecture.

    Raises:
        ExportError: it does not.
    """
    if not re.fullmatch(r"sm[1-9][0-9]{1,2}", arch):
        raise ExportError(f"arch={arch!r}: GPU architectures are named sm89 (compute capability 8.9), sm120, ...")


def arch_of(device: torch.device) -> str:
    """The architecture of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def gpu_arch(target: str, arch: str | None) -> str:
    """The architecture of the GPU at hand, for engines that are built on the GPU they are for.

    Raises:
        ExportError: there is no GPU, or it is not of the architecture `arch`.
    """
    if arch is not None:
        check_arch(arch)
    if not torch.cuda.is_available():
        raise ExportError(
            f"target={target!r} builds engines on the GPU that they are for, and torch sees none here: export on that "
            "machine, or use the target tensorrt-rtx, onnx or aoti"
        )
    here = arch_of(torch.device("cuda"))
    if arch not in (None, here):
        raise ExportError(f"arch={arch!r}: target={target!r} builds engines for the GPU at hand, and that is {here}")
    return here


def processor() -> str:
    """The kind of processor at hand, and its vector instructions: `x86_64 AVX512`."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def refuse_processor(where: str, built: str) -> None:
    """Raise where code was compiled for instructions that the processor at hand does not have.

    Raises:
        BundleError: it was; the code would end the process.
    """
    (kind, _, level), (here, _, found) = built.partition(" "), processor().partition(" ")
    older = _LEVELS[: _LEVELS.index(found) + 1] if found in _LEVELS else (found,)
    if kind != here or level not in older:
        raise BundleError(
            f"{where}: compiled for a processor of {built:.40}, and this is one of {here} {found}: export the bundle "
            "anew on a machine like this one"
        )


def refuse_other(where: str, arch: str, tools: Mapping[str, str], device: torch.device, **used: str) -> None:
    """Raise where engines were built for another GPU, or with other versions than run them here.

    Args:
        where: the bundle, for messages.
        arch: what its manifest says.
        tools: likewise.
        device: where it is to run.
        used: the versions that run it here.

    Raises:
        BundleError: they differ; an engine is never given to another version than built it.
    """
    for name, version in used.items():
        built = tools.get(name.replace("_", "-"), "an unknown version")
        if built != version:
            raise BundleError(
                f"{where}: its engines were built with {name.replace('_', '-')} {built}, and {version} is installed: "
                "an engine runs on the version that built it; export the bundle anew"
            )
    if arch != arch_of(device):
        raise BundleError(
            f"{where}: its engines are for {arch}, and {device} is {arch_of(device)}: export the bundle anew with "
            f"arch={arch_of(device)!r}"
        )

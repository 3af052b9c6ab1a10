"""Writing safetensors files that others may read, with tcc's own errors where that fails."""

from __future__ import annotations

import os
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tcc.errors import TccError

__all__ = ["save_tensors", "write_tensors"]

_MASK = os.umask(0)  # there is no way to read it but to set it: once, while nobody else writes
os.umask(_MASK)


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, which others may read as they may other new files: safetensors lets nobody else.

    Raises:
        SafetensorError, OSError: it cannot be written.
    """
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    os.chmod(path, 0o666 & ~_MASK)


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    *,
    what: str,
    error: type[TccError],
) -> None:
    """Write one safetensors file.

    Args:
        tensors: contiguous tensors by name, none of which share memory.
        path: where to.
        metadata: texts for the header.
        what: what the file is, for a message.
        error: what to raise where it cannot be written; safetensors has an error of its own, which is no `OSError`.

    Raises:
        TccError: the file cannot be written.
    """
    try:
        save_tensors(tensors, path, metadata)
    except (SafetensorError, OSError) as cause:
        raise error(f"{os.fspath(path)}: {what} cannot be written ({cause}): write to another place") from cause

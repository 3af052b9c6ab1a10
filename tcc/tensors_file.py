"""Writing safetensors files that others may read, with tcc's own errors where that fails."""

from __future__ import annotations

import json
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
    """Write one safetensors file: the same bytes for the same content, and for others to read as other new files are.

    safetensors writes the header's texts in an order of chance, and lets nobody else read.

    Raises:
        SafetensorError, OSError: it cannot be written.
    """
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    os.chmod(path, 0o666 & ~_MASK)
    if metadata is not None and len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: str | os.PathLike[str]) -> None:
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as it is padded: what follows stays where it is
            file.seek(8)
            file.write(text.ljust(size))


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

"""The weights that an ONNX file declares, read without a library: running a bundle takes ONNX Runtime alone.

ONNX Runtime is given the weights' memory, and then looks at neither their shapes nor their dtypes. A file is a message
of protocol buffers (https://protobuf.dev/programming-guides/encoding); the numbers of its fields are onnx.proto3's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from tcc.errors import BundleError
from tcc.export.decode import Malformed
from tcc.export.manifest import WEIGHTS

__all__ = ["NUMBERS", "check_weights"]

#: ONNX's numbers for dtypes (onnx.TensorProto.DataType).
NUMBERS = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6, torch.int64: 7, torch.bool: 9,
    torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DTYPE, _NAME, _LOCATION = 1, 2, 8, 14
_EXTERNAL = 1


def check_weights(path: Path, names: tuple[str, ...], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise where a graph declares other weights than it is given, or reads some from elsewhere.

    Args:
        path: the ONNX file.
        names: the weights that it is given.
        weights: all weights by name.

    Raises:
        BundleError: names the weight; or the file is no ONNX.
    """
    try:
        declared = list(_initializers(memoryview(path.read_bytes())))
    except (Malformed, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not a graph of ONNX ({error}): export the bundle anew") from error
    if missing := set(names) - weights.keys():
        raise BundleError(f"{path}: reads {min(missing)!r:.80}, which {WEIGHTS} does not have: export the bundle anew")
    for name, number, shape, outside in declared:
        if name not in names:
            if outside:
                raise BundleError(f"{path}: {name!r:.80} lies in a file that the manifest does not give to the graph")
            continue
        given = (NUMBERS.get(weights[name].dtype), tuple(weights[name].shape))
        if given != (number, shape):
            raise BundleError(
                f"{path}: the weight {name!r:.80} is {weights[name].dtype} {list(given[1])}, and the graph declares "
                f"{list(shape)[:16]} of ONNX's dtype {number}: export the bundle anew"
            )
    if missing := set(names) - {name for name, *_ in declared}:
        raise BundleError(f"{path}: the graph has no weight {min(missing)!r:.80}, and the manifest gives it one")


def _initializers(model: memoryview) -> Iterator[tuple[str, int, tuple[int, ...], bool]]:
    """Name, number of the dtype, shape, and whether the data lies in another file."""
    for number, graph in _fields(model):
        if number != _GRAPH:
            continue
        for inner, tensor in _fields(_message(graph)):
            if inner == _INITIALIZER:
                yield _initializer(_message(tensor))


def _initializer(tensor: memoryview) -> tuple[str, int, tuple[int, ...], bool]:
    name, kind, outside = "", 0, False
    shape: list[int] = []
    for number, value in _fields(tensor):
        if number == _DIMS:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == _NAME:
            name = bytes(_message(value)).decode()
        elif number == _DTYPE and isinstance(value, int):
            kind = value
        elif number == _LOCATION:
            outside = value == _EXTERNAL
    return name, kind, tuple(shape), outside


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: numbers, and the bytes of everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(data, at)
        if kind not in (1, 2, 5) or at + size > len(data):
            raise Malformed(f"a field of kind {kind} and {size} bytes")
        yield key >> 3, data[at : at + size]
        at += size


def _packed(data: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number at a place, seven bits in a byte, and the place after it."""
    value = 0
    for count, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, at + count + 1
    raise Malformed("a number without an end")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise Malformed("a number where a message is expected")
    return value

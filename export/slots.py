"""The slots of one run, for runtimes that must not write where they read."""

from __future__ import annotations

import torch

from tcc.errors import BundleError
from tcc.export.manifest import TensorSpec

__all__ = ["Slots"]


class Slots:
    """The kept values of one run, and a second buffer for each one that a graph returns anew.

    A graph reads `current` and writes `spare`; `swap` then makes the spare one current. Nothing is copied.

    Args:
        specs: names, shapes and dtypes.
        device: where they live.

    Raises:
        BundleError: there is no memory for them.
    """

    def __init__(self, specs: tuple[TensorSpec, ...], device: torch.device) -> None:
        self._device = device
        self._specs = {spec.name: spec for spec in specs}
        self.current = {spec.name: self._new(spec) for spec in specs}
        self._spare: dict[str, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """The bytes of all buffers."""
        return sum(tensor.nbytes for tensor in (*self.current.values(), *self._spare.values()))

    def spare(self, name: str) -> torch.Tensor:
        """The buffer that the next value of slot `name` is written to."""
        if name not in self._spare:
            self._spare[name] = self._new(self._specs[name])
        return self._spare[name]

    def swap(self, name: str) -> None:
        """The spare buffer of slot `name` holds its value from now on."""
        self.current[name], self._spare[name] = self.spare(name), self.current[name]

    def _new(self, spec: TensorSpec) -> torch.Tensor:
        try:
            return torch.zeros(spec.shape, dtype=spec.torch_dtype, device=self._device)
        except (RuntimeError, MemoryError) as error:
            raise BundleError(
                f"{spec.name!r:.80}: {self._device} has no memory for its {spec.bytes / 2**20:.1f} MiB ({error}): use "
                "a larger device, or a plan with fewer or narrower slots"
            ) from error

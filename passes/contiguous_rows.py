"""Where the rows of a stream begin as a transposed view, copy that view, so that what is computed from them is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tcc.passes.base import Pass
from tcc.passes.graph import emit, shape, sized_by_data
from tcc.passes.views import viewed

__all__ = ["ContiguousRows"]

aten = torch.ops.aten
_CONTIGUOUS = {"memory_format": torch.contiguous_format}
#: How images may lie, by their dimensions.
_IMAGES = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class ContiguousRows(Pass):
    """Copy transposed views that elementwise operators read, which would hand their layout on.

    Before: `x = transpose(flatten(conv(image), 2), 1, 2) + positions`: every later value of the stream lies as
            `[B, D, S]`, as its residual adds keep the layout of `x`
    After:  `x = clone(transpose(...), contiguous) + positions`

    Compiled as a whole, a graph does not keep to such layouts: Inductor chooses them. But what passes from one of the
    sub-graphs of `OutlineRepeats` to another lies as captured. With torch 2.11 some of Inductor's kernels for the CPU
    that normalise transposed rows are wrong: they keep one row where they need sixteen.
    """

    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm`; see the class."""
        views = [node for node in gm.graph.nodes if _is_transposed(node) and viewed(node) is not None]
        handed_on = [view for view in views if any(_takes_layout(user, view) for user in view.users)]
        for view in handed_on:
            users = list(view.users)
            with gm.graph.inserting_after(view):
                copy = emit(gm.graph, aten.clone.default, (view,), _CONTIGUOUS, like=view)
            for user in users:
                user.replace_input_with(view, copy)
        return len(handed_on)


def _is_transposed(node: fx.Node) -> bool:
    """Whether the entries of a row lie apart in memory; images in a channels-last format do not count."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.layout != torch.strided or val.dim() < 2 or sized_by_data(node):
        return False
    by_channels = any(val.dim() == dim and val.is_contiguous(memory_format=kept) for dim, kept in _IMAGES.items())
    return val.shape[-1] > 1 and val.stride(-1) > 1 and not by_channels


def _takes_layout(user: fx.Node, view: fx.Node) -> bool:
    """Whether `user` is elementwise, and its value lies as `view` does."""
    elementwise = torch.Tag.pointwise in getattr(user.target, "tags", ())
    return elementwise and shape(user) == shape(view) and _is_transposed(user)

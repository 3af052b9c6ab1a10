"""Sheets of images: rows of samples in the same noise, with what is known of each row beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["SheetRow", "draw_sheet"]

_DPI = 120
_SIDE = 108  # about how large an image is drawn, in pixels


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet.

    Attributes:
        title: in bold, e.g. the method; "" for none.
        detail: below it, e.g. its speed and error.
        images: `[N, C, H, W]` in [-1, 1], 1 or 3 channels.
    """

    title: str
    detail: str
    images: Tensor


def draw_sheet(path: str | os.PathLike[str], rows: Sequence[SheetRow], columns: Sequence[str], caption: str) -> None:
    """Draw the rows below each other.

    Args:
        path: where to; the suffix chooses the format.
        rows: the rows, with the same number of images each.
        columns: a heading for each image.
        caption: a line below the sheet: what was done, on what machine; "" for none.
    """
    count, tall = rows[0].images.shape[0], rows[0].images.shape[2]
    frame = tall + 2 * _gap(tall)
    side = max(1, round(_SIDE / frame)) * frame / _DPI  # inches: every pixel becomes a whole number of pixels
    label = 2.3 if any(row.title for row in rows) else 0.1
    head, foot = 0.3, 0.32 if caption else 0.05
    width, height = max(label + side * count + 0.1, 3.0), head + side * len(rows) + foot
    figure = Figure(figsize=(width, height), dpi=_DPI)
    for number, row in enumerate(rows):
        bottom = foot + side * (len(rows) - 1 - number)
        axes = figure.add_axes((label / width, bottom / height, side * count / width, side / height))
        _draw_row(axes, row, columns if number == 0 else ())
        middle = (bottom + side / 2) / height
        figure.text(0.08 / width, middle + 0.02 / height, row.title, fontsize=9.5, weight="bold", va="bottom")
        figure.text(0.08 / width, middle - 0.02 / height, row.detail, fontsize=8, color="#555555", va="top")
    if caption:
        figure.text(0.08 / width, 0.1 / height, caption, fontsize=7, color="#555555", va="bottom")
    figure.savefig(path, facecolor="white")


def _gap(tall: int) -> int:
    """White pixels around an image."""
    return max(1, tall // 16)


def _draw_row(axes: Axes, row: SheetRow, columns: Sequence[str]) -> None:
    """The images side by side, with a gap between them."""
    pixels = ((row.images.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, C]
    gap = _gap(pixels.shape[1])
    framed = np.pad(pixels, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=1.0)
    strip = np.concatenate(list(framed), axis=1)  # [H, N * W, C]
    axes.imshow(
        strip.squeeze(-1) if strip.shape[-1] == 1 else strip,
        cmap="gray",
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_axis_off()
    step = framed.shape[2]
    for number, heading in enumerate(columns):
        axes.text((number + 0.5) * step, -1, heading, fontsize=8, ha="center", va="bottom", color="#555555")

"""The image grid, among other tokens or alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tcc
from tests.tiny_models import Block, case, noise


class Mixed(nn.Module):
    """Text tokens around an image of 2 x 3 patches of 2 x 2 pixels; the image may be split where it leaves."""

    def __init__(self, *, before: int, after: int, patchify: bool = True, cut: bool = True) -> None:
        super().__init__()
        self.before, self.after, self.patchify, self.cut = before, after, patchify, cut
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Join, transform, cut the image out."""
        patches = x.reshape(-1, 2, 2, 3, 2).permute(0, 1, 3, 2, 4).reshape(-1, 6, 4) if self.patchify else x
        parts = [text[:, : self.before], self.embed(patches), text[:, self.before :]]
        stream = torch.cat(parts, dim=1)
        for block in self.blocks:
            stream = block(stream)
        if not self.cut:
            return stream
        image: Tensor = self.head(stream[:, self.before : self.before + 6])
        return image.reshape(-1, 2, 3, 4)


@pytest.mark.parametrize(("before", "after"), [(0, 5), (5, 0), (2, 3)])
@pytest.mark.parametrize(("patchify", "cut"), [(True, False), (False, True), (True, True)])
def test_an_image_among_text_tokens(before: int, after: int, patchify: bool, cut: bool) -> None:
    """Found above the blocks by the view that makes patches tokens, or below them by the one that undoes it."""
    model = Mixed(before=before, after=after, patchify=patchify, cut=cut).eval()
    x = noise(2, 4, 6) if patchify else noise(2, 6, 4)
    info = tcc.inspect(model, x, noise(2, before + after, 16, seed=3))
    assert (info.grid, info.num_tokens) == ((2, 3), before + 6 + after)
    assert info.image_tokens == (before, before + 6)


def test_tokens_alone() -> None:
    """With a grid or without, all tokens are taken for image tokens."""
    assert (case("dit").info.grid, case("dit").info.image_tokens) == ((4, 4), (0, 16))
    assert (case("separate").info.grid, case("separate").info.image_tokens) == ((), (0, 12))


def test_conditions_before_the_image() -> None:
    """U-ViT's label and time; the table says so."""
    info = case("uvit").info
    assert (info.grid, info.image_tokens, info.num_tokens) == ((4, 4), (2, 18), 18)
    assert "18 tokens (grid 4 x 4 from token 2 on)" in str(info.table().title)
    assert "16 tokens (grid 4 x 4)" in str(case("dit").info.table().title)

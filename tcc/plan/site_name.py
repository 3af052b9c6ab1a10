"""The names of sites: `<block>.<branch>.<kind>@<stream>`, without `@` on the main stream."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

__all__ = ["SITE_KINDS", "SiteName"]

SITE_KINDS = ("out", "delta", "stream", "skip", "kv")


@dataclass(frozen=True)
class SiteName:
    """The parts of a site's name.

    Attributes:
        owner: the branch (`blocks.0.attn`) or the block (`blocks.0`) that it belongs to.
        kind: `out`, `delta`, `stream`, `skip` or `kv`.
        stream: the stream; "" for the main one.
    """

    owner: str
    kind: str
    stream: str = ""

    @staticmethod
    @functools.cache  # rules over steps and sites ask again and again
    def parse(name: str) -> SiteName:
        """The parts of `name`, whether or not they name a site that exists."""
        path, _, stream = name.partition("@")
        owner, _, kind = path.rpartition(".")
        return SiteName(owner, kind, stream)

    def __str__(self) -> str:
        return f"{self.owner}.{self.kind}" + (f"@{self.stream}" if self.stream else "")

    @property
    def branch(self) -> str:
        """The branch, with its stream: `blocks.0.attn`, `blocks.0.attn@text`."""
        return self.owner + (f"@{self.stream}" if self.stream else "")

    @staticmethod
    def of_branch(branch: str, kind: str) -> SiteName:
        """A site of a branch that is named with its stream."""
        owner, _, stream = branch.partition("@")
        return SiteName(owner, kind, stream)

    def but(self, kind: str) -> str:
        """The name of a site of the same branch, of another kind."""
        return str(replace(self, kind=kind))

    def keeps_part_of(self, branch: str) -> bool:
        """Whether the site keeps a part of `branch`: its output, its delta, its keys, or its block's delta."""
        owner, _, stream = branch.partition("@")
        block = owner.rpartition(".")[0]
        return self.stream == stream and (self.owner == owner or (self.kind == "delta" and self.owner == block))

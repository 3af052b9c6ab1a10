"""Bundles that several tests of exporting read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import tcc
from tcc.export import Written, bundle
from tests.export.bundles import planned
from tests.tiny_models import case


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: the ONNX bundle of that name (see `planned`), made once; not to be changed."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def make(name: str) -> Written:
        which, plan = planned(name)
        return bundle(which.model, plan, (which.args, which.kwargs), folder / name)

    return make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX bundle of five steps: three graphs, two token sets, a forecast; not to be changed."""
    which, site, other = case("separate"), "blocks.0.mlp.delta", "blocks.1.attn.delta"
    tokens = {"few": torch.arange(0, 12, 3), "odd": torch.arange(1, 12, 3)}
    actions = {(2, site): tcc.Update("few"), (3, site): tcc.Update("odd"), (4, other): tcc.Reuse(1, (2.0, -1.0))}
    plan = which.info.count(tcc.CachePlan(num_steps=5, actions=actions, tokens=tokens))
    return bundle(which.model, plan, (which.args, {}), tmp_path_factory.mktemp("bundle") / "small").folder


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: the AOTInductor bundle of that name, made once, likewise."""
    folder = tmp_path_factory.mktemp("aoti")

    @functools.cache
    def make(name: str) -> Written:
        which, plan = planned(name)
        return bundle(which.model, plan, (which.args, which.kwargs), folder / name, target="aoti")

    return make

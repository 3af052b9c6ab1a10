"""Settings for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tcc
from tcc.runtime.image import Images
from tests.running import compiled, token_plan
from tests.tiny_models import case

torch.set_num_threads(1)  # the models are tiny: waiting for a second thread costs more than it computes


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Give back the thread count that a script sets."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _shared() -> tcc.CompiledModel:
    return compiled(case("dit"), token_plan("dit"))


@pytest.fixture
def model(_shared: tcc.CompiledModel) -> tcc.CompiledModel:
    """The tiny DiT, compiled once for a token plan; at step 0, without sessions."""
    _shared._images = Images()
    return _shared

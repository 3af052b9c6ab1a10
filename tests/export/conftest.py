"""Bundles that several tests of exporting read."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tcc.export import Written, bundle
from tests.export.bundles import mixed
from tests.tiny_models import case


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: the ONNX bundle of the tiny model of that name under the mixed plan, made once; not to be changed."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def make(name: str) -> Written:
        which = case(name)
        return bundle(which.model, mixed, (which.args, which.kwargs), folder / name)

    return make

"""One small random model for all tests of generation."""

from __future__ import annotations

import pytest

import minem
from tests.minem.folders import make_folder


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_folder(path, "qwen3")
    return path


@pytest.fixture(scope="package")
def loaded(folder):
    return minem.load(folder)

"""The embedded model with an adapter of random weights, and small embedded benchmarks."""

from pathlib import Path

import datasets
import pytest
from eval_models import make_adapter

from fura_vlm.embedded.benchmarks import write_benchmarks


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "benchmarks"
    write_benchmarks(folder, per_task=6)
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("run") / "adapter")

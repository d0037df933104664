"""Each family in turn, with its small model."""

import pytest
from family_models import BUILDERS
from transformers import AutoConfig

from fura_vlm.families.base import Family
from fura_vlm.families.registry import family_class


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    """All of these tests."""


@pytest.fixture(params=list(BUILDERS))
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(name, folder_of):
    return folder_of(name)


@pytest.fixture
def family(name, folder) -> Family:
    config = AutoConfig.from_pretrained(folder)
    cls = family_class(config)
    return cls(cls.load_processor(str(folder), config), config)

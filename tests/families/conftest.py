"""A folder with a small model for each family, made once."""

import pytest
import torch
from family_models import BUILDERS
from transformers import AutoConfig

from fura_vlm.families.base import Family
from fura_vlm.families.registry import family_class


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these are done before a second one has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            BUILDERS[name](made[name])
        return made[name]

    return folder


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

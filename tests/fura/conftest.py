import pytest
from fura_models import CASES


@pytest.fixture(params=list(CASES))
def case(request):
    """A model builder and target_modules for it: Llama, LLaVA, GPT-NeoX, GPT-2."""
    return CASES[request.param]

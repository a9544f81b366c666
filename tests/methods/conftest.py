from __future__ import annotations

import pytest

from .models import FAMILIES, build


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return build(family)

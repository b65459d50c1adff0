import pytest

import clearspan

TEXT = "def area(self):\n    return self.width"


@pytest.fixture(scope="session")
def bridge():
    return clearspan.boot("tiny-bigcode")


@pytest.fixture(scope="session")
def tokens(bridge):
    return bridge.to_tokens(TEXT)

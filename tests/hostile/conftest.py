import pytest

from ..threads import one_thread


@pytest.fixture(autouse=True)
def few_threads():
    with one_thread():
        yield

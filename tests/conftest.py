import gc
import os
import random

import hypothesis
import pytest

# The same examples every time, so that a red test is red again when it is run again.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
# The first of them, for a second time with other kernels.
hypothesis.settings.register_profile("brief", derandomize=True, deadline=None, max_examples=15)
# Others and more of them, for what holds only by luck of the examples: pytest --hypothesis-profile=wide --hypothesis-seed=1
hypothesis.settings.register_profile("wide", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    """Two threads; one in each of xdist's workers, which share the cores. `OMP_NUM_THREADS`, where it is given, decides."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
    elif not getattr(config.option, "numprocesses", None):  # the workers would get it from the one that distributes
        import torch

        torch.set_num_threads(2)


def pytest_collection_modifyitems(config, items):
    """What takes long first, so that no worker is left with it when the others have nothing to do."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What was imported stays, and need not be looked through whenever garbage is collected."""
    gc.freeze()


@pytest.fixture(autouse=True)
def same_luck():
    """What a test draws without a seed of its own depends on no test before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device():
    """The GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poor_device(monkeypatch):
    """A device without float64, there while the test runs."""
    from pml_htl.common import precision

    from .no_float64 import DEVICE, DeviceMode

    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", (DEVICE.type,))
    with DeviceMode():
        yield DEVICE


@pytest.fixture(scope="session")
def glyphs():
    """The data set, rendered once for all tests."""
    from benchmarks import data

    return data.load("glyphs")


@pytest.fixture
def tiny(glyphs, monkeypatch):
    """Twenty classes of each split, with eight images each, as the data set "tiny"."""
    import torch

    from benchmarks import data
    from benchmarks.data.splits import LabelledImages, Splits

    def first_classes(images):
        kept = torch.cat([(images.labels == label).nonzero()[:8, 0] for label in images.labels.unique()[:20]])
        return LabelledImages(images.images[kept], images.labels[kept])

    parts = [first_classes(part) for part in (glyphs.train, glyphs.val, glyphs.test)]
    splits = Splits("tiny", *parts, glyphs.class_names)
    monkeypatch.setitem(data.IN_MEMORY, "tiny", lambda: splits)
    return splits

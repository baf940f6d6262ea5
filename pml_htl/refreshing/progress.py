"""How far a pass over the data set has come, shown as PML's trainers and testers show theirs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tqdm
from torch.utils.data import DataLoader

from ..distributed import Ranks

DELAY = 1.0  # seconds; what is over sooner shows nothing


def with_progress(loader: DataLoader[Any], ranks: Ranks) -> Iterable[Any]:
    """The batches of a loader, and on the first rank a bar from the second second on; `TQDM_DISABLE=1` turns it off."""
    others = {"disable": True} if ranks.rank else {}  # only then: what is given here counts more than the environment
    return tqdm.tqdm(loader, desc="refresh of the class tree", delay=DELAY, **others)

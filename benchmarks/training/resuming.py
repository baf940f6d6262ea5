"""What a comparison adds to the checkpoint of a training: which training it is of, and the files that PML's hooks wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.commit import current_commit
from ..data import Splits
from ..methods.contenders import Contender


def checkpoint_of(folder: Path) -> Path:
    """The file in the folder of a run; it is there until its outcome is in the results file."""
    return folder / "checkpoint.pt"


def made_with(contender: Contender, seed: int, plan: dict[str, Any], data: Splits) -> dict[str, Any]:
    """All that the outcome of a training depends on, the code and the number of loader workers included."""
    return {
        "method": contender.method.name,
        "settings": contender.settings,
        "seed": seed,
        "plan": plan,
        "data": data.describe(),
        "commit": current_commit(),
        "torch": str(torch.__version__),
    }


@dataclass(frozen=True)
class MadeWith:
    """A state that loads only into the same training."""

    settings: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises a `ValueError` unless it is of this training."""
        differing = sorted(name for name in {*state, *self.settings} if state.get(name) != self.settings.get(name))
        if differing:
            found, wanted = ({name: values.get(name) for name in differing} for values in (state, self.settings))
            raise ValueError(f"it was made with {found}, but now it is {wanted}")


@dataclass(frozen=True)
class RunFiles:
    """The records and the best models of a run, as they were at the end of an epoch.

    PML writes them in place, bit by bit, so after a kill they may be half-written, or of an epoch that will be run again.
    """

    folder: Path

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The bytes of each file, by its path in the folder."""
        # Models of the last epoch, not the best, are those of the checkpoint itself.
        paths = [path for path in self._paths() if path.parent.name == "records" or "best" in path.name]
        return {
            path.relative_to(self.folder).as_posix(): torch.from_numpy(np.fromfile(path, dtype=np.uint8)) for path in paths
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Makes the files what they were."""
        for path in self._paths():
            path.unlink()
        for name, content in state.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content.numpy().tofile(path)

    def _paths(self) -> list[Path]:
        return [path for kind in ("records", "models") for path in sorted((self.folder / kind).glob("*")) if path.is_file()]

"""Good batches, and batches with one thing wrong: for each the error and a part of its message."""

import numpy as np
import torch

UNKNOWN = 10**6
NOT_INTEGERS = (TypeError, "must be integers")
NO_BATCH = (ValueError, "one label per embedding|must be of shape")

# From labels (B,) int64 to something that is no labels of these embeddings.
BAD_LABELS = {
    "floats": (lambda labels: labels.double(), NOT_INTEGERS),
    "booleans": (lambda labels: labels > 0, NOT_INTEGERS),
    "complex": (lambda labels: labels + 0j, NOT_INTEGERS),
    "list of floats": (lambda labels: (labels + 0.5).tolist(), NOT_INTEGERS),
    "strings": (lambda labels: list(map(str, labels.tolist())), NOT_INTEGERS),
    "objects": (lambda labels: [None] * len(labels), NOT_INTEGERS),
    "too large": (lambda labels: np.full(len(labels), 2**63, dtype=np.uint64), (ValueError, "int64.*9223372036854775808")),
    "ragged": (lambda labels: [[1], [1, 2]], (ValueError, "rows of several lengths")),
    "of another data set": (lambda labels: labels + UNKNOWN, (ValueError, r"labels? \d{6,}.*not among the \d+ classes")),
    "one of another data set": (
        lambda labels: torch.cat([labels[1:], labels.new_tensor([UNKNOWN])]), (ValueError, f"label {UNKNOWN} not among")
    ),
    "2-D": (lambda labels: labels.unsqueeze(1), NO_BATCH),
    "0-D": (lambda labels: labels[0], NO_BATCH),
    "a number": (lambda labels: int(labels[0]), NO_BATCH),
    "one too few": (lambda labels: labels[1:], NO_BATCH),
    "none": (lambda labels: labels[:0], NO_BATCH),
}  # fmt: skip

# The same for embeddings (B, D) float.
BAD_EMBEDDINGS = {
    "list": (lambda embeddings: embeddings.tolist(), (TypeError, "tensor of floats, but got list")),
    "array": (lambda embeddings: embeddings.detach().numpy(), (TypeError, "tensor of floats, but got ndarray")),
    "missing": (lambda embeddings: None, (TypeError, "tensor of floats, but got NoneType")),
    "integers": (lambda embeddings: embeddings.long(), (TypeError, "tensor of floats, but got torch.int64")),
    "booleans": (lambda embeddings: embeddings > 0, (TypeError, "tensor of floats, but got torch.bool")),
    "complex": (lambda embeddings: embeddings + 0j, (TypeError, "tensor of floats, but got torch.complex")),
    "sparse": (lambda embeddings: embeddings.to_sparse(), (TypeError, "dense tensor")),
    "1-D": (lambda embeddings: embeddings[:, 0], (ValueError, r"shape \(B, .*but they are \(\d+,\)")),
    "3-D": (lambda embeddings: embeddings.unsqueeze(1), (ValueError, r"shape \(B, .*but they are \(\d+, 1, \d+\)")),
    "0-D": (lambda embeddings: embeddings.sum(), (ValueError, r"shape \(B, .*but they are \(\)")),
    "one too few": (lambda embeddings: embeddings[1:], NO_BATCH),
    "none": (lambda embeddings: embeddings[:0], NO_BATCH),
}  # fmt: skip
NOT_FINITE = {"NaN": torch.nan, "infinite": torch.inf, "minus infinite": -torch.inf}


def draw_batch(classes, dimensions, seed, size=6, dtype=torch.float64):
    """Random embeddings (B, D), near others of their class, and labels (B,) of some of the classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.as_tensor(classes)
    labels = classes[torch.randint(len(classes), (size,), generator=generator)]
    centres = torch.empty(size, dimensions)
    for row, label in zip(centres, labels.tolist(), strict=True):
        row.copy_(torch.randn(dimensions, generator=torch.Generator().manual_seed(label % 1009)))
    return (centres + 0.5 * torch.randn(size, dimensions, generator=generator)).to(dtype), labels

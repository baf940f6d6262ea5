"""The comparison of Hierarchical Triplet Loss with the losses of pytorch-metric-learning; `python -m benchmarks --help`."""

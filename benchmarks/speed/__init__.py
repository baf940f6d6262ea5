"""What the parts of the package cost, beside their peers and floors. `python -m benchmarks speed`."""

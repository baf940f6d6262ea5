"""What every room uses: labels, batches, saved states, warnings and precision."""

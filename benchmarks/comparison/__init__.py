"""Many trainings: methods and seeds, or the trials of a search."""

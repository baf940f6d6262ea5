"""What is kept of trainings and timings: results files, intervals, tables and plots."""

"""What every room uses: the processes of a job, and which code runs."""

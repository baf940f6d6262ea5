"""The report of results files: one HTML page that opens offline, and the same as Markdown."""

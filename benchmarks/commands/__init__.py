"""The command line: one module for the commands that train, one for those that time, one for those that show."""

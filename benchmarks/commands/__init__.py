"""The command line: a module each for the commands that train, that look at data, that time, and that show."""

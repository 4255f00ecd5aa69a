"""Where to run: the command line, the distributed start, and the scripts."""

"""What to run: the schema with every default, and how a file becomes a configuration."""

"""The configuration: its schema, how files and overrides are read, and numbers of workers and threads."""

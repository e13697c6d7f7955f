"""The configuration: its schema, the reading of files and overrides, and numbers of workers and threads."""

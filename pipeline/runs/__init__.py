"""The run directory: file names, record, checkpoints, network files, environment, and the mirror in a bucket."""

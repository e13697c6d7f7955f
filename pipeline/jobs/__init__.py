"""The jobs: each builds its run and returns the figures of `--json`."""

"""The jobs. Each executes a run and returns the result that `--json` prints."""

"""The study: does the search pay? `python -m tests.benchmarks.study` runs it, a core-hour at a time."""

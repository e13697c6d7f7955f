"""The jobs as Python functions. `import pipeline` has the same names, see `pipeline.api.jobs`."""

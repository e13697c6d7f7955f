"""MLflow: the tracker, its store, the model registry, lineage, queries, references, promotion and user interface."""

"""Ray: the runtime, allotment, launching of workers, pre-flight checks and job submission."""

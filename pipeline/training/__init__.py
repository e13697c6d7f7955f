"""The code that runs on every worker: pictures, networks, epochs, the training loop, compute devices and profiling."""

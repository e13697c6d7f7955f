"""Sweeps: search space, Optuna study, Ray Tune, trials and figures."""

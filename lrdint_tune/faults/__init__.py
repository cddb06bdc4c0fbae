"""Disturb real training runs and see what is left of them: ``python -m lrdint_tune.faults --help``."""

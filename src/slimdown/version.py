"""The version, in one place: the build reads it here, and every run's key contains it."""

__version__ = "0.1.0"

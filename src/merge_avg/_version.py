"""The version of merge-avg, in a module of its own so that every package can name it."""

__version__ = "0.1.0"

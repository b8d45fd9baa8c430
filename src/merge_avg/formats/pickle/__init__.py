"""Pickles: read without being run, and written."""

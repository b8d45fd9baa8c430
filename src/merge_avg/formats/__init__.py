"""The formats of checkpoints: `registry` knows those of files, `directory` those of sets."""

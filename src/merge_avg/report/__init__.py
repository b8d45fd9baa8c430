"""What is said of a merge? The report as values, and what renders it."""

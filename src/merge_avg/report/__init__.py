"""What is said of a merge? A report as typed values, and one module for each way to show it.

values                 the report of a merge that ran, or of a planned one, and its JSON
text, terminal, html   the same for readers; Markdown is in `text`
inspect                the contents of a checkpoint
printable              names, numbers and tables as they may be shown
"""

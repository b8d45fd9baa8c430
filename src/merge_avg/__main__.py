"""python -m merge_avg."""

from merge_avg.cli import entry

entry()

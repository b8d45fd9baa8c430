"""Reading a pickle without a checkpoint around it."""

from merge_avg.formats.pickle.load import load


def read(data):
    """Return the value of a pickle; persistent ids become tuples, and no call is known."""
    return load(data, persistent=lambda pid: ("persistent", pid), call=lambda _f, _a: None).value

"""Which numbers do codes stand for, and which codes has their mean?

A weight of 8 bits or 4 is a code times a scale, and its mean one of such products. `find` finds
these tensors in all checkpoints of a merge, by their structure. A `Scaled` is one of them, a
composite: its numbers are averaged, and become codes with new scales by the rule of their scheme.
"""

from __future__ import annotations

from merge_avg.scaled._find import Found, find, may_have, refuse_scaled
from merge_avg.scaled._scaled import Scaled

__all__ = ["Found", "Scaled", "find", "may_have", "refuse_scaled"]

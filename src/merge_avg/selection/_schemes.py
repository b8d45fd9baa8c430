"""Weights by rule: from the order of the checkpoints, from a metric, or for post-hoc EMA."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

from merge_avg.errors import UsageError
from merge_avg.options import MOST_BITS, Mode, suggested

# Schemes whose weights depend on how far apart the checkpoints are.
BY_TIME = ("ema", "1-sqrt", "power")


def resolve(
    scheme: str,
    count: int,
    metrics: Sequence[float | None] = (),
    mode: Mode | None = None,
    times: Sequence[int] = (),
) -> tuple[Fraction, ...]:
    """Return the weights of `count` checkpoints, the oldest first; they need not sum to one.

    The scheme "linear" is 1, 2, 3, ...; "ema:DECAY" is the exponential moving average that starts
    at the first checkpoint; "1-sqrt" merges in place of a 1 - sqrt decay of the learning rate;
    "power:SIGMA" is the power-function EMA of a relative width; and "metric" is in proportion to a
    metric, or to its inverse where lower is better.

    Of the schemes in `BY_TIME`, those of other `times` (steps or epochs, which grow) than 1, 2, 3,
    ... have other weights. A decay is that of the median distance.
    """
    if scheme == "uniform":
        return (Fraction(1),) * count
    if scheme == "linear":
        return tuple(Fraction(number) for number in range(1, count + 1))
    if scheme == "1-sqrt":
        # The mean of x_1 ... x_N is x_1 plus updates, that from x_j to x_{j+1} scaled by the sum of
        # the weights after j. For a decay of the learning rate it is to be g(j/N) = 1 - sqrt(j/N),
        # so that the weights are g((j-1)/N) - g(j/N). Sources: Haegele et al. (arXiv:2405.18392)
        # for the decay, WSM (Tian et al. 2025, arXiv:2507.17634) for merging in its place.
        # Checkpoints that are not evenly apart have their own times in place of j.
        ages = [Fraction(0), *_counted(times, count)]
        curve = [Fraction(1 - math.sqrt(age / ages[-1])) for age in ages]
        return tuple(a - b for a, b in itertools.pairwise(curve))
    if scheme == "metric":
        return _by_metric(metrics, mode)
    if scheme.startswith("ema:"):
        return _moving(scheme.removeprefix("ema:"), _counted(times, count))
    if scheme.startswith("power:"):
        return _power(scheme.removeprefix("power:"), times or range(1, count + 1))
    hint = "choose one of uniform, linear, ema:DECAY, 1-sqrt, power:SIGMA, metric"
    known = ("uniform", "linear", "1-sqrt", "metric")
    raise UsageError(f"there is no weighting {scheme!r}", hint=suggested(scheme, known, hint))


def _counted(times: Sequence[int], count: int) -> Sequence[Fraction]:
    """Return times in median distances, the first as long after the start as is usual."""
    if len(times) < 2:
        return [Fraction(number) for number in range(1, count + 1)]
    distances = sorted(b - a for a, b in itertools.pairwise(times))
    half = len(distances) // 2
    usual = Fraction(distances[half] + distances[~half], 2)  # the median
    return [(time - times[0]) / usual + 1 for time in times]


def _moving(text: str, times: Sequence[Fraction]) -> tuple[Fraction, ...]:
    # Powers of whole numbers are exact, unless they are of a length that nobody needs.
    whole = all(time.denominator == 1 for time in times)
    try:
        # The powers of 0.999...9 with a million digits, or of 1e-999999, would never end.
        short = len(text) <= 20 and ("e" not in text.lower() or float(text) > 1e-20)
        decay = Fraction(text if short else -1)
    except (ValueError, ZeroDivisionError):
        decay = Fraction(-1)
    if not 0 < decay < 1 or decay.denominator.bit_length() * len(times) > MOST_BITS:
        hint = "give a number between 0 and 1, of fewer digits for more checkpoints, as in ema:0.9"
        raise UsageError(f"the decay {text!r} is not understood, or too long", hint=hint)
    exact = whole and decay.denominator.bit_length() * times[-1] <= MOST_BITS

    def left(distance: Fraction) -> Fraction:
        return decay ** int(distance) if exact else Fraction(float(decay) ** float(distance))

    # avg = decay * avg + (1 - decay) * x, unrolled from the first checkpoint on; the decay of a
    # distance is a power of that of the median one.
    rest = [(1 - left(b - a)) * left(times[-1] - b) for a, b in itertools.pairwise(times)]
    return (left(times[-1] - times[0]), *rest)


def _power(text: str, times: Sequence[int]) -> tuple[Fraction, ...]:
    """Return weights by which checkpoints make a power-function EMA of a relative width.

    Each stands for the steps since the one before, the first for all before it: it has the share
    of the profile (see `phema`) that lies there.
    """
    try:
        sigma = float(text)
    except ValueError:
        sigma = -1.0
    gamma = exponent(sigma)
    if times[0] <= 0:
        raise UsageError("a checkpoint of step 0 has no part in an EMA", hint="leave it out")
    shares = [Fraction(float(time / times[-1]) ** (gamma + 1)) for time in (0, *times)]
    return tuple(b - a for a, b in itertools.pairwise(shares))


def _by_metric(metrics: Sequence[float | None], mode: Mode | None) -> tuple[Fraction, ...]:
    if mode is None:
        hint = "name the metric with --metric, and its direction with --mode min or --mode max"
        raise UsageError("weights by a metric need one, and its direction", hint=hint)
    found = []
    for value in metrics:
        if value is None or not math.isfinite(value) or value <= 0:
            what = f"a metric of {value}" if value is not None else "an unknown metric"
            raise UsageError(f"{what} cannot be a weight", hint="give the weights with --weights")
        # By way of its shortest decimal, 0.1 is 1/10: the weights are those that the log shows.
        found.append(Fraction(str(value)))
    return tuple(value if mode == "max" else 1 / value for value in found)


def phema(snapshots: Sequence[tuple[float, float]], sigma: float) -> tuple[Fraction, ...]:
    """Return the weights of stored power-function EMAs that come nearest to one of another width.

    Each snapshot is the step and the relative width of a stored EMA; `sigma`, the width asked for,
    lies between 0 and 0.28. A power-function EMA at step T has the profile
    p(t) = (g + 1) t^g / T^(g+1) over training steps 0 to T. The weights, some perhaps negative,
    minimise the squared distance between the sum of the stored profiles and the one asked for at
    the last step stored. They are divided by their sum, as every profile has the integral 1: what
    never changed stays as it is. Source: Karras et al. 2024 (arXiv:2312.02696), appendix C.
    """
    if len(set(snapshots)) < len(snapshots):
        raise UsageError("two stored averages have the same step and width", hint="name each once")
    profiles = [(Fraction(step), Fraction(exponent(width))) for step, width in snapshots]
    if any(step <= 0 for step, _ in profiles):
        raise UsageError("a stored average has step 0", hint="leave it out")
    wanted = max(step for step, _ in profiles), Fraction(exponent(sigma))
    # The normal equations of the least squares.
    weights = _solved([[_inner(a, b) for b in (*profiles, wanted)] for a in profiles])
    total = sum(weights)
    if not total:
        raise UsageError("the stored averages cannot make this one", hint="choose another width")
    # The exact fractions have hundreds of digits, far beyond what their float exponents justify.
    return tuple((weight / total).limit_denominator(10**15) for weight in weights)


def exponent(sigma: float) -> float:
    """Return the exponent of the profile that has a relative width, or raise UsageError."""
    # It is the positive root of sigma^2 (g + 2)^2 (g + 3) = g + 1, and falls as sigma grows.
    if not 0 < sigma < width(0):
        hint = f"choose one above 0 and below {width(0):.4f}"
        raise UsageError(f"no EMA has the relative width {sigma}", hint=hint)
    low, high = 0.0, 1.0
    while width(high) > sigma:
        high *= 2
        if high > 1e12:
            raise UsageError(f"the width {sigma} is too small", hint="choose 0.001 or more")
    # Bisect down to neighbouring floats, so that the result does not depend on a tolerance.
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if width(middle) > sigma else (low, middle)


def width(gamma: float) -> float:
    """Return the relative width of a profile: its standard deviation, divided by its end."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def _inner(a: tuple[Fraction, Fraction], b: tuple[Fraction, Fraction]) -> Fraction:
    """Return the integral of the product of two profiles, whose power is rounded to a float."""
    (end_a, gamma_a), (end_b, gamma_b) = a, b
    if end_a > end_b:
        return _inner(b, a)
    # The profiles overlap from 0 to the earlier end. With that as end_a the integral is
    # (g_a + 1) (g_b + 1) / (g_a + g_b + 1) / end_b * (end_a / end_b)^g_b, whose power is at most 1
    # and cannot overflow, however large an exponent is.
    power = math.exp(float(gamma_b) * math.log(end_a / end_b)) if end_a != end_b else 1.0
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return Fraction(power) * scale / end_b


def _solved(rows: list[list[Fraction]]) -> list[Fraction]:
    """Solve linear equations, each a row with its right side at the end, by elimination."""
    # In exact fractions, because profiles of similar width make the matrix all but singular.
    for column in range(len(rows)):
        pivot = max(range(column, len(rows)), key=lambda i: abs(rows[i][column]))
        if not rows[pivot][column]:
            hint = "leave out one of two whose step and width are nearly the same"
            raise UsageError("the stored averages do not differ enough", hint=hint)
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for i in range(len(rows)):
            if i != column:
                factor = rows[i][column] / rows[column][column]
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    return [row[-1] / row[column] for column, row in enumerate(rows)]

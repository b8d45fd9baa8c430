"""Figures of the agreement, from sums of products."""

import math
import random

import pytest
import torch

from merge_avg.agreement._cosines import _jackknife, agreement, agreement_about


def test_the_jackknife_is_that_of_its_definition():
    """The squared deviations of what came out without each group, times (n - 1) / n."""
    assert _jackknife([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt((4 + 1 + 9) * 2 / 3))
    assert _jackknife([1.0, math.nan, 3.0]) == pytest.approx(math.sqrt(2 * 2 / 3))
    assert _jackknife([0.5]) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_the_figures_are_those_of_their_definitions(whole):
    """Means over pairs, per checkpoint and over all, shrinkage and the error, by torch."""
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(5, 4, 30, generator=generator, dtype=torch.float64)
    grams = parts @ parts.mT
    found = agreement([gram.flatten().tolist() for gram in grams], [], 600, 600 if whole else 60)
    rows = parts.transpose(0, 1).flatten(1)
    pairs = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    each = (pairs.sum(dim=1) - 1) / 3
    assert torch.tensor(found.pairs) == pytest.approx(pairs)
    assert torch.tensor(found.each) == pytest.approx(each)
    assert found.mean == pytest.approx(float(each.mean()))
    assert found.shrinkage == pytest.approx(
        float(rows.mean(dim=0).norm() / rows.norm(dim=1).mean())
    )
    without = []
    for group in range(5):
        rest = torch.cat([parts[other] for other in range(5) if other != group], dim=1)
        cosines = torch.nn.functional.cosine_similarity(rest[:, None], rest[None], dim=2)
        without.append((float(cosines.sum()) - 4) / 12)
    assert found.error == (0 if whole else pytest.approx(_jackknife(without)))
    assert (found.size, found.elements) == (600, 600 if whole else 60)


def test_a_checkpoint_of_zeros_has_no_cosine():
    """Nor have its pairs; the others have theirs, and two of zeros leave nothing to compare."""
    gram = [4.0, 0, 2, 0, 0, 0, 2, 0, 4]
    found = agreement([gram], [], 9, 9)
    assert found.each == (0.5, None, 0.5)
    assert found.pairs == ((1.0, None, 0.5), (None, 1.0, None), (0.5, None, 1.0))
    assert agreement([[4.0, 0, 0, 0]], [], 9, 9) is None
    assert agreement([[4.0, math.nan, math.nan, 1]], [], 9, 9) is None


def test_a_tensor_has_its_figures():
    """The mean weighted by norms, and the distances from the mean; of too few elements nothing."""
    choose = random.Random(3)  # noqa: S311 - numbers for a test
    rows = torch.tensor([[choose.gauss(1, 1) for _ in range(50)] for _ in range(3)]).double()
    squares = rows.square().sum(dim=1)
    products = rows @ rows.sum(dim=0)
    found, other = (
        agreement_about("w", (5, 10), 50, elements, squares.tolist(), products.tolist())
        for elements in (50, 9)
    )
    norms = squares.sqrt()
    off = ~torch.eye(3, dtype=torch.bool)
    between = (norms[:, None] * norms)[off].sum()
    assert found.mean == pytest.approx(float((rows @ rows.T)[off].sum() / between))
    away = (rows - rows.mean(dim=0)).norm(dim=1) / norms.square().mean().sqrt()
    assert found.distances == pytest.approx(away.tolist())
    assert found.norm == pytest.approx(float(norms.square().mean().sqrt()))
    assert (found.error, other.mean) == (0, None)
    assert other.error == pytest.approx(1 / 3)

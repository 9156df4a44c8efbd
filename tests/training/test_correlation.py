"""The correlations that choose the best vectors, against numpy and the definition."""

import numpy as np
import pytest

from redmux_adapters.train.correlation import matthews, pearson


def test_pearson_is_numpys():
    drawn = np.random.default_rng(0)
    one, other = drawn.normal(size=(2, 40))
    assert pearson(list(one), list(other)) == pytest.approx(np.corrcoef(one, other)[0, 1])


@pytest.mark.parametrize("num_classes", [2, 4])
def test_matthews_is_the_correlation_of_one_column_for_each_class(num_classes):
    drawn = np.random.default_rng(1)
    p, r = drawn.integers(num_classes, size=(2, 60))
    columns = np.eye(num_classes)[p], np.eye(num_classes)[r]
    one, other = (column - column.mean(0) for column in columns)
    expected = (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())
    assert matthews(p.tolist(), r.tolist()) == pytest.approx(expected)


def test_answers_that_never_change_correlate_with_nothing():
    assert matthews([1, 1, 1], [0, 1, 1]) == 0
    assert pearson([0.5, 0.5], [0.1, 0.9]) == 0

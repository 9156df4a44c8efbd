"""Which adapters are not computed any more."""

import pytest

from redmux.errors import FailedPreconditionError
from redmux_server.engine.quarantine import Quarantine


def test_three_failures_in_a_row_and_nothing_between_them_are_too_many():
    quarantine = Quarantine()
    for _ in range(2):
        quarantine.failed("a")
        quarantine.failed("a")
        quarantine.check("a")
        quarantine.passed("a")
    for _ in range(3):
        quarantine.failed("a")
    quarantine.check("b")
    with pytest.raises(FailedPreconditionError, match=r"^a has produced values that are not"):
        quarantine.check("a")


def test_no_more_than_a_bound_are_remembered_the_latest():
    quarantine = Quarantine()
    for digest in range(5000):
        for _ in range(3):
            quarantine.failed(str(digest))
    assert len(quarantine._failures) == 4096
    quarantine.check("0")
    with pytest.raises(FailedPreconditionError):
        quarantine.check("4999")

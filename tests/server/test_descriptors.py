"""File descriptors: the limit of this very process, raised and shared out."""

import resource

import pytest

from redmux_server import descriptors


@pytest.fixture
def set_soft():
    """Sets the soft limit until the test has ended."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda num: resource.setrlimit(resource.RLIMIT_NOFILE, (num, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_is_raised_as_far_as_the_system_allows(set_soft):
    set_soft(256)
    descriptors.raise_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


def test_connections_of_both_doors_leave_half_of_the_descriptors(set_soft):
    set_soft(256)
    assert descriptors.max_connections() == 64

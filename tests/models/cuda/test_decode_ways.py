"""Each batch size gets the fastest way of those that compute the same."""

import logging

import pytest
import torch

from redmux_server.models.cuda.decode_ways import Chosen, choose_way, summary
from redmux_server.models.cuda.decoder import DecodeWay


class Ways:
    """Ways that fill logits with their values and take the seconds given."""

    def __init__(self, dtype=torch.float32, **ways):
        self.logits = torch.zeros(2, 3, dtype=dtype)
        self.ways = [DecodeWay(name, None, *most) for name, (_, _, *most) in ways.items()]
        self._ways = ways
        self.captured = []
        self._last = ""

    def capture(self, way):
        values, _, *_ = self._ways[way.name]
        self.captured.append(way.name)
        if isinstance(values, Exception):
            raise values

        def replay():
            self._last = way.name
            self.logits.copy_(torch.tensor(values))

        return replay

    def seconds(self, replay):
        replay()
        return self._ways[self._last][1]

    def choose(self, num_rows=4):
        replay, chosen = choose_way(self.ways, num_rows, self.capture, self.logits, self.seconds)
        replay()
        assert self._last == chosen.name
        return chosen


SAME = [1.0, 2.0, 3.0]


def test_the_fastest_is_chosen():
    assert Ways(a=(SAME, 4.0), b=(SAME, 3.0), c=(SAME, 2.0)).choose() == Chosen("c", 0.5)
    assert Ways(a=(SAME, 4.0), b=(SAME, 3.0), c=(SAME, 3.5)).choose() == Chosen("b", 0.75)
    assert Ways(a=(SAME, 2.0), b=(SAME, 3.0)).choose() == Chosen("a", 1.0)


def test_a_way_for_fewer_rows_is_not_even_captured():
    ways = Ways(a=(SAME, 4.0), b=(SAME, 3.0, 4))
    assert ways.choose(5) == Chosen("a", 1.0)
    assert ways.captured == ["a"]
    assert ways.choose(4).name == "b"


@pytest.mark.parametrize("wrong", [[1.0, 2.0, 3.001], [1.0, float("nan"), 3.0]])
def test_a_way_that_computes_something_else_is_not_used(wrong, caplog):
    with caplog.at_level(logging.WARNING):
        assert Ways(a=(SAME, 4.0), b=(wrong, 1.0)).choose() == Chosen("a", 1.0)
    assert "not used for 4 rows: b: its logits differ by" in caplog.text


def test_the_order_of_sums_may_differ_in_half_precision():
    ways = Ways(torch.bfloat16, a=(SAME, 4.0), b=([1.0, 2.0, 3.03], 1.0))
    assert ways.choose().name == "b"


def test_a_way_that_cannot_be_captured_is_not_used(caplog):
    ways = Ways(a=(SAME, 4.0), b=(ValueError("out of resource"), 1.0), c=(SAME, 3.0))
    with caplog.at_level(logging.WARNING):
        assert ways.choose().name == "c"
    assert "b: out of resource" in caplog.text


def test_what_the_first_way_raises_is_raised():
    with pytest.raises(RuntimeError, match="no capture"):
        Ways(a=(RuntimeError("no capture"), 1.0), b=(SAME, 1.0)).choose()


def test_the_summary_tells_sizes_and_what_they_gain():
    chosen = {8: Chosen("a", 1.0), 1: Chosen("b", 0.812), 2: Chosen("b", 0.9), 16: Chosen("a", 1.0)}
    assert summary(chosen) == (
        "b for 1, 2 requests (0.81 to 0.90 of the time of separate kernels); a for 8, 16 requests"
    )

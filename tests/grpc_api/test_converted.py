"""Lists of messages: counted before they are converted, and cut into pages that can be sent."""

from types import SimpleNamespace

import pytest

from redmux.v1 import adapter_service_pb2 as pb
from redmux_server.grpc_api.converted import PAGE_BYTES, Converted, fill_page
from redmux_server.grpc_api.methods import message_limits


def test_items_are_converted_when_they_are_asked_for():
    asked = []

    def convert(index, item):
        asked.append(index)
        return f"{index}{item}"

    items = Converted(["a", "b", "c"], convert)
    assert (len(items), bool(items), asked) == (3, True, [])
    assert (items[1], asked) == ("1b", [1])
    assert list(items) == items[:] == ["0a", "1b", "2c"]
    assert items[1:] == ["1b", "2c"]


def replies(num, num_bytes):
    return [pb.Adapter(name=str(i), description="x" * num_bytes) for i in range(num)]


@pytest.mark.parametrize(
    ("num", "num_bytes", "size", "num_first", "has_more"),
    [
        (3, 10, 5, 3, False),
        (5, 10, 5, 5, False),
        (6, 10, 5, 5, True),
        (5, PAGE_BYTES // 4, 5, 3, True),  # each has a few bytes beside its description
        (2, 2 * PAGE_BYTES, 5, 1, True),
        (1, 2 * PAGE_BYTES, 5, 1, False),
        (0, 0, 5, 0, False),
    ],
)
def test_a_page_ends_where_it_is_full_or_too_large(num, num_bytes, size, num_first, has_more):
    page, more = fill_page(iter(replies(num, num_bytes)), size)
    assert [reply.name for reply in page] == [str(i) for i in range(num_first)]
    assert more == has_more


def test_methods_that_take_data_have_limits_of_their_own():
    registry = SimpleNamespace(max_file_bytes=3 << 20)
    limits = message_limits(registry, SimpleNamespace(trains=True))
    assert limits["/redmux.v1.InferenceService/Embed"] == 4 << 20
    assert limits["/redmux.v1.AdapterService/PutAdapter"] == 4 << 20
    assert limits["/redmux.v1.TrainingService/CreateJob"] == 16 << 20
    assert "/redmux.v1.AdapterService/GetAdapter" not in limits
    without = message_limits(registry, SimpleNamespace(trains=False))
    assert max(without.values()) == 4 << 20

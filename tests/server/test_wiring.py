"""What a server is made of, by its configuration and its model."""

from types import SimpleNamespace

import pytest
import torch

from redmux_server.config import ServerConfig
from redmux_server.wiring import _may_draft


@pytest.mark.parametrize(
    ("wanted", "bit_identical", "decoder_start", "device", "drafts"),
    [
        ("auto", True, None, "cpu", True),
        ("off", True, None, "cpu", False),
        ("auto", False, None, "cpu", False),
        ("auto", True, 0, "cpu", False),
        ("auto", True, None, "cuda", False),
    ],
)
def test_there_are_drafts_only_where_they_change_no_bit(
    wanted, bit_identical, decoder_start, device, drafts
):
    model = SimpleNamespace(
        bit_identical=bit_identical, decoder_start=decoder_start, device=torch.device(device)
    )
    assert _may_draft(ServerConfig(drafts=wanted), model) is drafts

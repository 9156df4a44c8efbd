"""A tiny base to train on."""

import pytest

from redmux_adapters.train import TrainingBase


@pytest.fixture
def training_base(base):
    return TrainingBase.of(base.model, base.tokenizer, "tiny")

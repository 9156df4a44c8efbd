"""Loading an encoder: what of a checkpoint may be missing, and what is said meanwhile."""

import pytest
from encoders import save_tiny_encoder
from safetensors.torch import load_file, save_file

from redmux.errors import InvalidArgumentError
from redmux_adapters.bases.load_any import load_any


def save_without(folder, ending):
    """A checkpoint without the weights whose names have `ending` in them."""
    path = save_tiny_encoder(folder, "roberta") / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ending not in name}
    save_file(kept, path, metadata={"format": "pt"})
    return str(folder)


def test_a_checkpoint_without_a_pooler_loads_without_a_word(tmp_path, capfd):
    """transformers would print a table of what is missing, after a progress bar."""
    folder = save_without(tmp_path, "pooler.")
    capfd.readouterr()
    assert load_any(folder).pooler is None
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_that_lacks_other_weights_is_refused(tmp_path):
    """Else they would be random ones, others at each start."""
    folder = save_without(tmp_path, "layer.1.output.dense.weight")
    with pytest.raises(InvalidArgumentError, match=r"lacks 1 of its weights, such as encoder\.la"):
        load_any(folder)

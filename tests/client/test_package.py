import dataclasses
import pickle
import subprocess
import sys
import types

import pytest

import redmux

HEAVY = ("torch", "transformers", "numpy", "safetensors", "redmux_server", "redmux_adapters")


@pytest.mark.parametrize("module", ["redmux", "redmux.cli"])
def test_import_leaves_the_heavy_packages_out(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout == "[]\n"


def test_all_is_sorted_and_complete():
    public = {
        name
        for name, value in vars(redmux).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert redmux.__all__ == sorted({*public, "__version__"})


def test_every_error_is_exported():
    def tree(kind):
        return {kind}.union(*map(tree, kind.__subclasses__()))

    own = (kind for kind in tree(redmux.RedmuxError) if kind.__module__ == "redmux.errors")
    for kind in own:
        assert getattr(redmux, kind.__name__) is kind


def test_exported_names_say_where_they_are_imported_from():
    for name in redmux.__all__:
        value = getattr(redmux, name)
        if isinstance(value, type):
            assert value.__module__ == "redmux"


@pytest.mark.parametrize(
    "kind",
    [
        redmux.Adapter,
        redmux.Chunk,
        redmux.Classification,
        redmux.Classifications,
        redmux.Completion,
        redmux.Embeddings,
        redmux.Job,
        redmux.JobTask,
        redmux.Latencies,
        redmux.Load,
        redmux.ServerInfo,
        redmux.TrainingEvaluation,
        redmux.TrainingStep,
        redmux.TrainingTask,
        redmux.Usage,
    ],
)
def test_values_are_frozen_slotted_and_picklable(kind):
    value = kind(*range(len(dataclasses.fields(kind))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(kind)[0].name, None)
    assert not hasattr(value, "__dict__")
    assert pickle.loads(pickle.dumps(value)) == value


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(redmux.ResourceExhaustedError("full", 1.5)))
    assert (error.message, error.retry_after_s) == ("full", 1.5)


@pytest.mark.parametrize(
    ("sync", "asynchronous"),
    [
        (redmux.Client, redmux.AsyncClient),
        (redmux.Adapters, redmux.AsyncAdapters),
        (redmux.Jobs, redmux.AsyncJobs),
    ],
)
def test_both_clients_have_the_same_names(sync, asynchronous):
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(sync) == public(asynchronous)


def test_a_client_does_not_show_its_key():
    client = redmux.Client("localhost:1", api_key="s3cret")
    assert "s3cret" not in repr(client._connection.settings)
    client.close()

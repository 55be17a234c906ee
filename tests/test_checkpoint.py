"""A checkpoint whose hash is right and whose parts are not: told in a sentence before a weight is set."""

import numpy as np
import pytest

from workbench import WorkbenchError
from workbench.training import checkpoint, fast, network

SETTINGS = {"network": "Tiny", "precision": "float32", "image_size": 32, "findings": ["Mass"], "workers": 1}
SETTINGS |= {"batch_size": 4}
EPOCH = {"epoch": 1, "val_loss": 0.5, "val_auroc": 0.7, "best": 1}


@pytest.fixture(scope="module")
def trained():
    model = network.build_network("Tiny", findings=1, image_size=32, weights=None)
    optimizer = fast.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def write_other(folder, trained, changes, *, history=(EPOCH,)):
    """A checkpoint of other arrays (None: without it), signed as `write` would."""
    model, optimizer = trained
    checkpoint.write(folder, SETTINGS, list(history), model, optimizer, model.get_weights())
    with np.load(folder / "checkpoint" / "last.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "sha256"}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(folder / "checkpoint" / "last.npz", sha256=np.array(checkpoint._digest(arrays)), **arrays)


@pytest.mark.parametrize(
    "changes",
    [
        {"best_0000": None},
        {"best_0000": np.zeros(3, np.float32)},
        {"model_0001": None},
        {"optimizer_0000": np.array("text")},
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_nothing_is_set(tmp_path, trained, changes):
    write_other(tmp_path, trained, changes)
    before = [np.array(value) for value in trained[0].get_weights()]
    state = checkpoint.read(tmp_path)
    with pytest.raises(WorkbenchError, match=r"The checkpoint holds .* start a new run"):
        checkpoint.apply(state, SETTINGS, *trained)
    for was, value in zip(before, trained[0].get_weights(), strict=True):
        np.testing.assert_array_equal(was, value)


@pytest.mark.parametrize(
    "history", [[], [EPOCH | {"best": 0}], [EPOCH | {"val_loss": "low"}], [{"epoch": 1, "best": 1}], ["text"]]
)
def test_a_history_that_training_cannot_go_on_from_is_damage(tmp_path, trained, history):
    write_other(tmp_path, trained, {}, history=history)
    with pytest.raises(WorkbenchError, match=r"last\.npz is damaged"):
        checkpoint.read(tmp_path)

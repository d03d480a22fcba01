import numpy as np
import pytest
import tensorflow as tf

from mptrain import RunError
from mptrain.checkpoints import Checkpoints


def state(**values):
    return {path: tf.Variable(value) for path, value in values.items()}


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints, of the steps 1, 2 and 3, whose variable is the step."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", state(x=0.0), keep=3)
    for step in (1, 2, 3):
        checkpoints._state["x"].assign(step)
        checkpoints.save(step)
    return checkpoints


def restored(saved, **values):
    """Returns (step, value, warnings) of a restore into fresh variables."""
    fresh, warnings = state(**(values or {"x": -1.0})), []
    step = Checkpoints(saved.directory, fresh, keep=3).restore_newest(warnings.append)
    return step, float(fresh["x"]), warnings


def test_newest_is_restored(saved):
    assert restored(saved) == (3, 3.0, [])


def test_empty_folder_restores_nothing(tmp_path):
    assert Checkpoints(tmp_path, state(x=1.0), keep=1).restore_newest(print) is None


def test_only_the_newest_are_kept(saved):
    Checkpoints(saved.directory, state(x=4.0), keep=2).save(4)
    assert saved.steps() == [3, 4]


def test_half_written_checkpoint_is_invisible_and_replaced(saved):
    (saved.directory / ".temporary-ckpt-4").mkdir()
    (saved.directory / ".temporary-ckpt-4" / "state.index").write_bytes(b"half")
    assert saved.steps() == [1, 2, 3]
    saved.save(4)
    assert restored(saved)[0] == 4


@pytest.mark.parametrize("file", ["state.index", "state.data-00000-of-00001", "contents.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_checkpoint_is_passed_over_with_a_warning(saved, file, damage):
    path = saved.path(3) / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -1 if damage == "truncated" else 0])
    step, value, warnings = restored(saved)
    assert (step, value) == (2, 2.0)
    assert len(warnings) == 1
    assert "ckpt-3 is damaged" in warnings[0]


def test_flipped_byte_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"x": tf.Variable(tf.range(1000.0))}, keep=3)
    checkpoints.save(1)
    path = checkpoints.path(1) / "state.data-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="no checkpoint in .* is whole"):
        checkpoints.restore_newest(lambda message: None)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"x": 1.0, "y": 1.0}, "y is missing"),
        ({"y": 1.0}, "x is not in the model"),
        ({"x": [1.0, 2.0]}, r"x is \['float32', \[\]\], the model has \['float32', \[2\]\]"),
        ({"x": 1}, "the model has .'int32'"),
    ],
)
def test_checkpoint_of_another_state_is_refused_by_name(saved, values, fault):
    with pytest.raises(RunError, match=fault):
        Checkpoints(saved.directory, state(**values), keep=3).restore_newest(print)


def test_folder_that_cannot_be_written_is_an_error_and_loses_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="cannot be written"):
        Checkpoints(tmp_path / "file", state(x=1.0), keep=1).save(1)
    assert (tmp_path / "file").read_text() == "mine"


def test_replicas_restore_to_the_same_bits(mirrored, tmp_path):
    with mirrored(2).scope():
        variable = tf.Variable(1.5)
    checkpoints = Checkpoints(tmp_path, {"x": variable}, keep=1)
    checkpoints.save(1)
    variable.assign(0.0)
    checkpoints.restore_newest(print)
    np.testing.assert_array_equal([v.numpy() for v in variable.values], [1.5, 1.5])

import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from mptrain import RunError, tensor_file
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


def restored(saved, values=None, **options):
    """Returns (step, value, warnings) of a restore into fresh variables."""
    fresh, warnings = state(**(values or {"x": -1.0})), []
    step = Checkpoints(saved.directory, fresh, keep=3).restore_newest(warnings.append, **options)
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


@pytest.mark.parametrize("file", ["state.index", "state.data-00000-of-00001", "contents.json"])
def test_every_flipped_byte_is_noticed(tmp_path, file):
    """Every byte in turn; nothing of a damaged checkpoint reaches the variables."""
    written = np.random.default_rng(0).normal(size=[3, 5]).astype(np.float32)
    checkpoints = Checkpoints(tmp_path, {"a/kernel": tf.Variable(written), "step": tf.Variable(7, dtype=tf.int64)}, keep=1)
    checkpoints.save(1)
    path = checkpoints.path(1) / file
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        fresh = {"a/kernel": tf.Variable(tf.zeros([3, 5])), "step": tf.Variable(0, dtype=tf.int64)}
        with pytest.raises(RunError, match="is whole"):
            Checkpoints(tmp_path, fresh, keep=1).restore_newest(lambda message: None, put_aside=False)
        assert not fresh["a/kernel"].numpy().any()
        assert int(fresh["step"]) == 0


def damage_all(saved):
    for step in saved.steps():
        (saved.path(step) / "state.index").write_bytes(b"")


def test_run_without_a_whole_checkpoint_refuses_to_begin_anew_again_and_again(saved):
    damage_all(saved)
    for _ in range(2):
        with pytest.raises(RunError, match="restart_if_damaged=True"):
            restored(saved)
    assert saved.steps() == [1, 2, 3]
    assert restored(saved, restart=True)[0] is None
    assert saved.steps() == []
    with pytest.raises(RunError, match="restart_if_damaged=True"):  # nor over what was put aside
        restored(saved)


def test_looking_without_putting_aside_changes_nothing(saved):
    (saved.path(3) / "state.index").write_bytes(b"")
    assert restored(saved, put_aside=False)[0] == 2
    assert saved.steps() == [1, 2, 3]


def test_asynchronous_checkpoint_holds_the_state_of_its_step_and_not_of_a_later_one(tmp_path):
    variable = tf.Variable(tf.zeros([1000, 1000]))
    checkpoints = Checkpoints(tmp_path, {"x": variable}, keep=5, asynchronous=True)
    for step in range(1, 6):
        variable.assign(tf.fill([1000, 1000], float(step)))
        checkpoints.save(step)
        assert step - 1 in [*checkpoints.steps(), 0], "more than one checkpoint behind"
    checkpoints.wait()
    for step in range(1, 6):
        (value,) = tensor_file.read(checkpoints.path(step)).values()
        assert (value == step).all()


def test_asynchronous_failure_is_raised_at_the_next_save(tmp_path):
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, {"x": tf.Variable(tf.zeros([2000, 2000]))}, keep=5, asynchronous=True)
    checkpoints.save(1)
    checkpoints.wait()
    shutil.rmtree(directory)
    directory.write_text("a file where the folder was")
    with pytest.raises(RunError, match="cannot be written"):
        checkpoints.save(2)


def test_best_are_kept_beside_the_newest_across_restarts(tmp_path):
    def opened():
        return Checkpoints(tmp_path, state(x=1.0), keep=2, keep_best=2)

    ratings = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.8, 6: 0.2, 7: 0.3}
    for step, rating in ratings.items():
        checkpoints = opened()
        wanted = checkpoints.would_be_kept(rating)
        checkpoints.save(step)
        if wanted:
            checkpoints.rate(step, rating)
    assert opened().steps() == [2, 5, 6, 7]
    assert not opened().would_be_kept(0.7)
    assert not opened().would_be_kept(float("nan"))


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
        restored(saved, values)


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


FULL_DISK = """
import resource, signal, sys
import tensorflow as tf
from mptrain import RunError
from mptrain.checkpoints import Checkpoints

variable = tf.Variable(tf.zeros([100]))
Checkpoints(sys.argv[1], {"x": variable}, keep=5).save(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: writing fails in the middle of a file
try:
    Checkpoints(sys.argv[1], {"x": tf.Variable(tf.zeros([100_000]))}, keep=5).save(2)
except RunError as error:
    print(error)
"""


def test_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint_and_no_remains(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, cwd=os.getcwd())
    assert "the checkpoint of step 2 cannot be written" in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-1"]
    fresh = state(x=[0.0] * 100)
    assert Checkpoints(tmp_path, fresh, keep=5).restore_newest(print) == 1


def test_ratings_of_another_metric_do_not_count(tmp_path):
    first = Checkpoints(tmp_path, state(x=1.0), keep=1, keep_best=1, best="max accuracy")
    first.save(1)
    first.rate(1, 0.9)
    now = Checkpoints(tmp_path, state(x=1.0), keep=1, keep_best=1, best="min loss")
    assert now.would_be_kept(-2.0)
    for step, rating in ((2, -2.0), (3, -3.0)):
        now.save(step)
        now.rate(step, rating)
    assert now.steps() == [2, 3]


def test_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(saved):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot be read: .*Too many open files"):
            tensor_file.contents(saved.path(3))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert tensor_file.contents(saved.path(3))


def test_checkpoint_that_is_a_link_is_unlinked_when_its_time_has_come(saved, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    saved.path(1).rename(elsewhere)
    saved.path(1).symlink_to(elsewhere)
    saved.save(4)
    assert saved.steps() == [2, 3, 4]
    assert tensor_file.contents(elsewhere)


def test_checkpoint_that_another_process_removes_while_it_is_read_is_not_called_damaged(saved, monkeypatch):
    fresh, warnings = state(x=-1.0), []
    reader = Checkpoints(saved.directory, fresh, keep=3)
    read = tensor_file.read

    def late(path):
        if path == saved.path(3):
            shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(tensor_file, "read", late)
    assert reader.restore_newest(warnings.append, put_aside=False) == 2
    assert (fresh["x"].numpy(), warnings) == (2.0, [])

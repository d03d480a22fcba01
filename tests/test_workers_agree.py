"""What real worker processes must have in common, and how they are told when they do not."""

import signal

import pytest

from tests.runs import assert_same_checkpoint
from tests.test_multi_worker import ended, flags, wait_for_checkpoint, workers

pytestmark = pytest.mark.slow


def refused(results, message, only=None):
    for index, (status, _, stderr) in enumerate(results):
        assert status == 2, stderr
        assert "Traceback" not in stderr
        assert stderr.strip().splitlines()[-1].startswith(f"mptrain: worker {index} of 2: ")
        assert message in stderr or index != (only if only is not None else index)


def test_users_dataset_goes_on_with_the_same_bits_on_every_worker(tiny, tmp_path):
    dataset = ["--config.trainer=tests.trainers.DatasetTrainer", "--config.train.steps=60"]
    with workers(2, *flags(tiny, tmp_path / "whole"), *dataset) as processes:
        assert_done(processes)
    with workers(2, *flags(tiny, tmp_path / "stopped"), *dataset) as processes:
        wait_for_checkpoint(tmp_path / "stopped", processes)
        processes[0].send_signal(signal.SIGTERM)
        assert [status for status, _, _ in ended(processes)] == [143, 143]
    with workers(2, *flags(tiny, tmp_path / "stopped"), *dataset) as processes:
        assert_done(processes)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "stopped", 60)


def test_worker_with_fewer_examples_is_refused(tiny, tmp_path):
    fewer = tmp_path / "npz"
    for name, folder in (("all", 100), ("few", 40)):
        (fewer / name).mkdir(parents=True)
        write_npz(fewer / name, folder)
    own = {index: [f"--config.data.dir={fewer / name}"] for index, name in enumerate(("all", "few"))}
    npz = ["--config.data.name=npz", "--config.trainer=tests.trainers.NpzTrainer"]
    with workers(2, *flags(tiny, tmp_path / "run"), *npz, own=own) as processes:
        refused(ended(processes), "the number of training examples is")


def write_npz(folder, count):
    import numpy as np

    for split in ("train", "eval"):
        np.savez(folder / f"{split}.npz", inputs=np.zeros([count, 6, 6, 1], np.float32), targets=np.zeros([count], np.int32))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--mode=train"], "--mode is"),
        (["--config.devices.sync_batch_norm=True"], "config.devices.sync_batch_norm is"),
    ],
)
def test_workers_that_would_do_different_things_are_refused(tiny, tmp_path, own, message):
    with workers(2, *flags(tiny, tmp_path / "run"), own={1: own}) as processes:
        refused(ended(processes), message)


def test_worker_with_another_folder_is_refused_before_it_trains(tiny, tmp_path):
    with workers(2, *flags(tiny, tmp_path / "run"), own={1: [f"--workdir={tmp_path / 'other'}"]}) as processes:
        results = ended(processes)
    refused(results, "is not the chief's folder on worker 1")
    assert not (tmp_path / "run" / "checkpoints").exists()


def assert_done(processes):
    for status, _, stderr in ended(processes):
        assert status == 0, stderr

"""Each experiment trains in float16 on two replicas, learns, and resumes to the same bits."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import experiments as benchmark
from configs import resnet
from experiments import transformer
from mptrain import config_check, runner
from tests.conftest import ROOT
from tests.experiment_cases import EXPERIMENTS, tiny_config
from tests.runs import assert_same_checkpoint, rows

pytestmark = pytest.mark.slow  # left out by `make test-fast`


@pytest.fixture(scope="module", params=EXPERIMENTS, ids=lambda case: case.name)
def run(request, tmp_path_factory):
    """Returns a case, its config, the folder of its run of four steps, and what the last evaluation said."""
    folder = tmp_path_factory.mktemp(request.param.name)
    config = tiny_config(request.param, folder)
    return request.param, config, folder / "run", runner.run(config, folder / "run")


def test_four_steps_in_float16_on_two_replicas_learn(run):
    case, _, folder, _ = run
    values = [row[case.falls] for row in rows(folder, split="train")]
    assert len(values) == 4
    assert all(math.isfinite(value) for value in values)
    assert values[-1] < values[0]
    assert rows(folder, split="train", step=4)[0]["loss_scale"] == 2.0**10  # which is 1 where nothing is float16
    assert "2 replicas" in json.loads((folder / "config.json").read_text())["devices"]


def test_resume_after_two_steps_ends_with_the_same_bits(run, tmp_path):
    _, config, folder, outputs = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "ckpt-4")
    assert runner.run(config, tmp_path / "run") == outputs
    assert rows(tmp_path / "run", event="resume")[0]["step"] == 2
    assert_same_checkpoint(folder, tmp_path / "run", 4)


def test_benchmark_prints_what_the_run_came_to(run, tmp_path):
    case, _, folder, outputs = run
    (experiment,) = [each for each in benchmark.EXPERIMENTS if each.name == case.name]
    (tmp_path / f"{case.name}-{experiment.values[0]}").symlink_to(folder)  # a finished run, which is not repeated
    result = benchmark.run(experiment, experiment.values[0], tmp_path)
    assert (result.metric, result.steps, result.seconds) == (outputs[experiment.metric], 4, None)
    assert benchmark.row(experiment, [result] * 3).startswith(f"| {experiment.title} | `configs/{case.name}.py")


def test_bits_per_byte_leave_out_padding_and_are_the_loss_to_base_2():
    rng = np.random.default_rng(0)
    targets, logits = rng.integers(0, 256, [4, 5]), rng.normal(size=[4, 5, 256]).astype(np.float32)
    metric = transformer.BitsPerByte()
    metric.update_state(targets, logits, sample_weight=np.float32([1, 1, 0, 1]))
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits).numpy()
    assert float(metric.result()) == pytest.approx(losses[[0, 1, 3]].mean() / math.log(2), rel=1e-6)


def test_every_experiment_is_short_has_a_config_and_cases_and_a_row_in_the_table():
    experiments = list((ROOT / "experiments").glob("*.py"))
    table = (ROOT / "experiments" / "README.md").read_text()
    assert sorted(file.stem for file in experiments) == sorted({case.name for case in EXPERIMENTS})
    for file in experiments:
        assert len(file.read_text().splitlines()) < 150
        assert (ROOT / "configs" / file.name).exists()
        assert len(re.findall(rf"^\|.*configs/{file.name}.*\|$", table, re.MULTILINE)) == 1


@pytest.mark.parametrize(("there", "name"), [(True, "tfds:cifar10"), (False, "mnist")])
def test_images_that_auto_takes_are_named_in_one_line(there, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    if there:
        (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
        (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").touch()
    assert resnet.get_config().data.name == name
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"images: CIFAR-10, found in {tmp_path}" if there else "images: the embedded MNIST: there is no CIFAR"
    )


@pytest.mark.parametrize("images", resnet.IMAGES)
def test_images_that_are_named_are_taken_without_a_word(images, capsys):
    config = resnet.get_config(images)
    config.data.dir = "somewhere"
    config_check.validate(config)
    assert images in config.data.name
    assert capsys.readouterr() == ("", "")

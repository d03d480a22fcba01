"""Weights & Biases offline, MLflow in its own store, and a logger of the user's own, in one run that is killed and goes on."""

import json
import math
import shutil
import struct
import subprocess
import sys
import threading

import mlflow
import pytest
from wandb.proto.wandb_internal_pb2 import Record

from mptrain import InputError, RunError, config_check, run
from mptrain.loggers import fan_out
from tests.conftest import ROOT
from tests.runs import rows, tiny_config


def logged_config(*loggers):
    config = tiny_config()
    config.trainer = "tests.trainers.ModuleTrainer"
    config.train.update(steps=12, steps_per_loop=3)
    config.eval.every_steps = 6
    config.checkpoint.every_steps = 6
    config.log.loggers = loggers
    return config


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield


@pytest.fixture(scope="module")
def folder(environment, tmp_path_factory):
    """A run of 12 steps that is killed at its end, so that it goes on from step 6, to 18."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    config = logged_config("mlflow", "wandb", "tests.logging_classes.FileLogger")
    config.log.update(project="digits", tags=("baseline", "team=vision"))
    run(config, folder)
    shutil.rmtree(folder / "checkpoints" / "ckpt-12")
    config.train.steps = 18
    run(config, folder)
    return folder


@pytest.fixture(scope="module")
def in_mlflow(folder):
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    return client, found


@pytest.mark.slow
def test_mlflow_has_one_run_with_config_tags_name_and_status(folder, in_mlflow):
    _, found = in_mlflow
    assert found.info.run_name == "first"
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.learning_rate"] == "0.001"
    assert found.data.params["precision.policy"] == "mixed_float16"
    assert found.data.params["train.steps"] == "12"
    assert found.data.tags["changed.train.steps"] == "18 from step 6 on"
    assert found.data.tags["baseline"] == "true"
    assert found.data.tags["team"] == "vision"
    assert json.loads((folder / "loggers.json").read_text())["mlflow"] == found.info.run_id


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train/loss", "train/loss_scale", "eval/accuracy"])
def test_mlflow_has_each_row_once_though_the_killed_run_logged_some_twice(folder, in_mlflow, name):
    client, found = in_mlflow
    history = sorted((metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name))
    split, metric = name.split("/")
    assert history == [(row["step"], row[metric]) for row in rows(folder, split=split)]


def in_log(content, header=7, block=2**15):
    """Yields the records of a file in LevelDB's log format behind W&B's own header."""
    place, record = header, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # padding at a block's end
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def wandb_records(folder):
    """Returns (run ids, history rows, config, exit codes) of the W&B files in a run's folder, oldest first."""
    ids, history, config, exits = [], [], {}, []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in map(Record.FromString, in_log(path.read_bytes())):
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
            elif record.WhichOneof("record_type") == "exit":
                exits.append(record.exit.exit_code)
    return ids, history, config, exits


def test_wandb_has_one_run_in_the_folder_with_config_and_rows_over_step(folder):
    ids, history, config, exits = wandb_records(folder)
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    assert len(set(ids)) == 1
    assert json.loads((folder / "loggers.json").read_text())["wandb"] == ids[0]
    assert config["optimizer"]["learning_rate"] == 0.001
    assert exits == [0, 0]
    trained = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert trained == {row["step"]: row["loss"] for row in rows(folder, split="train")}
    evaluated = {row["step"]: row["eval/accuracy"] for row in history if "eval/accuracy" in row}
    assert evaluated == {row["step"]: row["accuracy"] for row in rows(folder, split="eval")}


def calls(folder, kind):
    found = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    return [call[1:] for call in found if call[0] == kind]


def test_users_logger_gets_rows_events_and_status(folder):
    assert [call[:2] for call in calls(folder, "row")][-2:] == [[18, "train"], [18, "eval"]]
    assert [18, "finished", {}] in calls(folder, "event")
    assert [call[:2] for call in calls(folder, "event")][:2] == [[12, "finished"], [6, "resume"]]
    assert calls(folder, "close") == [["finished"], ["finished"]]


def test_logger_whose_server_goes_away_is_one_warning_and_the_run_goes_on(tmp_path, capsys):
    run(logged_config("tests.logging_classes.AwayLogger"), tmp_path)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "AwayLogger" in line]
    assert warnings == [
        "mptrain: tests.logging_classes.AwayLogger failed and gets nothing more of this run, which goes on: no route to host"
    ]
    assert len(calls(tmp_path, "row")) == 2
    assert len(rows(tmp_path, split="train")) == 4
    assert rows(tmp_path, event="finished")


def test_logger_that_hangs_holds_nothing_up(monkeypatch, capsys):
    class Hanging:
        def row(self):
            threading.Event().wait()

    told = []
    monkeypatch.setattr(fan_out, "_PATIENCE", 0.2)
    background = fan_out._Background("hanging", Hanging(), told.append)
    for _ in range(3):
        background.call("row")
    background.call("close", "finished")
    background.join()
    assert told == ["hanging has not taken all rows within 0 s; the rest is in metrics.jsonl only"]


def test_failed_run_is_failed_in_mlflow_and_a_nan_is_a_nan(environment, tmp_path):
    config = logged_config("mlflow")
    config.trainer = "tests.action_trainers.NanLossTrainer"
    config.log.update(project="failed", name="sick")
    config.model = {"nan_from": 0, "nan_to": 100}
    with pytest.raises(RunError, match="loss is not finite in 3 loops"):
        run(config, tmp_path)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("failed").experiment_id])
    assert (found.info.status, found.info.run_name) == ("FAILED", "sick")
    assert math.isnan(client.get_metric_history(found.info.run_id, "train/loss")[0].value)


def test_run_that_mlflow_no_longer_has_becomes_a_new_one_there(environment, tmp_path):
    config = logged_config("mlflow")
    config.log.project = "moved"
    run(config, tmp_path)
    config.log.mlflow_uri = f"sqlite:///{tmp_path}/other.db"
    config.train.steps = 15
    run(config, tmp_path)
    client = mlflow.MlflowClient(config.log.mlflow_uri)
    (found,) = client.search_runs([client.get_experiment_by_name("moved").experiment_id])
    assert found.data.metrics["eval/loss"] == rows(tmp_path, split="eval")[-1]["loss"]


def test_logger_that_cannot_start_ends_the_run_before_its_first_step(tmp_path):
    with pytest.raises(RunError, match="config.log.loggers: tests.logging_classes.NeverLogger cannot start: not logged in"):
        run(logged_config("tests.logging_classes.NeverLogger"), tmp_path)
    assert rows(tmp_path, split="train") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("comet", "config.log.loggers names 'comet': write wandb, mlflow, or 'package.module.Class'"),
        ("tests.logging_classes.Missing", "which cannot be imported: .* has no class 'Missing'"),
        ("tests.trainers.TinyModule", "it is not a subclass of mptrain.Logger"),
    ],
)
def test_logger_that_is_none_is_refused_before_anything_is_written(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        run(logged_config(name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_is_named_though_a_folder_has_its_name(tmp_path, name):
    """In a Python that sees what mptrain needs before TensorFlow and no more."""
    (tmp_path / name).mkdir()
    code = (
        "import sys, importlib.machinery as m; find = m.PathFinder.find_spec\n"
        f"m.PathFinder.find_spec = lambda n, p=None, t=None: find(n, [{str(tmp_path)!r}] if n == {name!r} else p, t)\n"
        "from mptrain import config_check, default_config, InputError\n"
        f"c = default_config(); c.trainer, c.train.steps, c.log.loggers = 'a.B', 1, ({name!r},)\n"
        "try: config_check.validate(c)\nexcept InputError as e: print(e, 'tensorflow' in sys.modules)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == f"config.log.loggers names {name!r}, which is not installed: pip install 'mptrain[{name}]' False\n"


@pytest.mark.slow
def test_nothing_of_a_service_is_imported_when_it_is_off():
    code = "import sys; import mptrain.runner; print(sorted({'wandb', 'mlflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_texts_are_wanted_where_names_are(tmp_path):
    config = logged_config()
    config.log.tags = (3,)
    with pytest.raises(InputError, match=r"config.log.tags holds 3: write texts"):
        config_check.validate(config)

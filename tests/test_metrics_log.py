import json
import math

import pytest

from mptrain import RunError
from mptrain.metrics_log import MetricsLog


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resumed_log_drops_later_rows_and_cut_lines_and_keeps_events(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = ['{"step": 1, "split": "train"}', '{"step": 9, "split": "train"}', '{"step": 9, "event": "overflow"}']
    path.write_text("\n".join([*rows, '{"step": 3, "spl{"step": 4, "event": "x"}', '{"step": 2, "sp']))
    log = MetricsLog(path, last_step=1)
    log.row(2, "train", {"loss": math.nan, "accuracy": 0.5})
    log.close()
    kept = read(path)
    assert [row["step"] for row in kept] == [1, 9, 2]
    assert (kept[2]["loss"], kept[2]["accuracy"], kept[2]["nonfinite"]) == (None, 0.5, ["loss"])


def test_evaluating_process_removes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9, "split": "tr')
    MetricsLog(path, last_step=math.inf).close()
    assert path.read_text() == '{"step": 9, "split": "tr'


def test_full_disk_is_one_clear_error():
    log = MetricsLog("/dev/full", last_step=math.inf)
    with pytest.raises(RunError, match="/dev/full cannot be written to: No space left on device"):
        log.row(1, "train", {})

import json
import math

import pytest

from mptrain import RunError
from mptrain.metrics_log import MetricsLog


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resumed_log_drops_later_rows_and_cut_lines_and_keeps_events(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = ['{"step": 1, "split": "train"}', '{"step": 9, "split": "train"}', '{"step": 9, "event": "fallback"}']
    rows += ['{"step": 0, "event": "overflow"}', '{"step": 1, "event": "overflow"}', '{"step": 9, "event": "overflow"}']
    path.write_text("\n".join([*rows, '{"step": 3, "spl{"step": 4, "event": "x"}', '{"step": 2, "sp']))
    log = MetricsLog(path, last_step=1)
    log.row(2, "train", {"loss": math.nan, "accuracy": 0.5})
    log.close()
    kept = read(path)
    assert [row["step"] for row in kept] == [1, 9, 0, 2]
    assert (kept[3]["loss"], kept[3]["accuracy"], kept[3]["nonfinite"]) == (None, 0.5, ["loss"])


def test_evaluating_process_removes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9, "split": "tr')
    MetricsLog(path, last_step=math.inf).close()
    assert path.read_text() == '{"step": 9, "split": "tr'


def test_full_disk_is_one_clear_error():
    log = MetricsLog("/dev/full", last_step=math.inf)
    with pytest.raises(RunError, match="/dev/full cannot be written to: No space left on device"):
        log.row(1, "train", {})


@pytest.mark.parametrize("line", [b"\xff\xfe garbage\n", b"3\n", b"null\n", b'{"event": "x"}\n'])
def test_line_that_is_no_row_is_dropped_on_resume(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "split": "train"}\n' + line)
    MetricsLog(path, last_step=1).close()
    assert read(path) == [{"step": 1, "split": "train"}]


def test_evaluation_of_an_evaluating_process_is_not_taken_for_the_runs_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, last_step=math.inf)
    log.row(1, "eval", {"loss": 1.0})
    log.close()
    assert read(path)[0]["mode"] == "eval"
    assert not MetricsLog(path, last_step=1).has_evaluation(1)
    log = MetricsLog(path, last_step=1)
    log.row(1, "eval", {"loss": 1.0})
    log.close()
    log = MetricsLog(path, last_step=1)
    assert log.has_evaluation(1)
    log.row(1, "eval", {"loss": 1.0})
    log.close()
    assert len(read(path)) == 2


def test_log_that_could_not_be_written_can_be_closed():
    log = MetricsLog("/dev/full", last_step=math.inf)
    with pytest.raises(RunError):
        log.row(1, "train", {})
    log.close()

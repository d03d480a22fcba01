import time

from mptrain.pieces import Pieces


def run(pieces, steps, seconds_a_step):
    sizes = []
    for size in pieces.cut(steps):
        time.sleep(size * seconds_a_step)
        sizes.append(size)
    return sizes


def test_pieces_add_up_and_grow_to_the_time_they_may_take():
    pieces = Pieces(seconds=0.1)
    first = run(pieces, 200, 0.001)
    assert sum(first) == 200
    assert first[:2] == [1, 1]  # the first one's time is tracing and says nothing
    assert 30 < max(first) <= 100
    assert len(run(pieces, 200, 0.001)) <= 7


def test_slow_steps_run_one_by_one():
    assert run(Pieces(seconds=0.01), 4, 0.02) == [1, 1, 1, 1]


def test_pieces_get_smaller_when_steps_get_slower():
    pieces = Pieces(seconds=0.05)
    run(pieces, 100, 0.0005)
    assert run(pieces, 100, 0.02)[-1] <= 3


def test_pieces_end_where_accumulation_windows_do():
    sizes = run(Pieces(multiple=3, seconds=0.02), 30, 0.001)
    assert sum(sizes) == 30
    assert all(size % 3 == 0 for size in sizes)

"""What sixteen bits do to a run's numbers: range report, parity run, and where an overflow came from."""

from mptrain.numerics.recorder import watch

__all__ = ["watch"]

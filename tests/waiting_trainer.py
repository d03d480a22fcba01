"""A Trainer that stops at the place that WAIT_IN or FAIL_IN names, "build" or "eval", so that a test can meet it there."""

import os
import sys
import time

from tests.trainers import TinyTrainer


class WaitingTrainer(TinyTrainer):
    def build_model(self):
        _come_to("build")
        return super().build_model()

    def eval_begin(self):
        _come_to("eval")
        return super().eval_begin()


def _come_to(place):
    if os.environ.get("FAIL_IN") == place:
        raise KeyError("the user's own mistake")
    if os.environ.get("WAIT_IN") == place:
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(100)

"""Orbit actions: plain callables that get the outputs of a loop or of an evaluation when it has ended.

Orbit gives an action neither the step nor a way to stop the run; here each knows its trainer, and raises `StopRun`.
"""

from mptrain.actions.custom import CustomActions
from mptrain.actions.early_stop import EarlyStop
from mptrain.actions.ending import Action, Ending
from mptrain.actions.guards import NanGuard, OverflowGuard
from mptrain.actions.plateau import ReduceOnPlateau
from mptrain.actions.profile import ProfileWindow
from mptrain.actions.reporting import ArraysForTensorBoard, LogMetrics, ShowProgress
from mptrain.actions.saving import KeepBest, SaveCheckpoint
from mptrain.actions.stopping import StopOnSignal

__all__ = [
    "Action",
    "ArraysForTensorBoard",
    "CustomActions",
    "EarlyStop",
    "Ending",
    "KeepBest",
    "LogMetrics",
    "NanGuard",
    "OverflowGuard",
    "ProfileWindow",
    "ReduceOnPlateau",
    "SaveCheckpoint",
    "ShowProgress",
    "StopOnSignal",
]

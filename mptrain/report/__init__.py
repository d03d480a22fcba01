"""The report of a training run: `report/index.html`, made from what lies in the run's folder, and from nothing else.

`python -m mptrain.report DIR` writes it for any run's folder, also for one whose process was killed.
"""

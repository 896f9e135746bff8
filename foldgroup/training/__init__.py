"""The trainer: the paper's recipe on a folder of images, on one process or many, seeded and resumable. Prints nothing.

In the order a run goes: :mod:`~foldgroup.training.config` (settings and recipes) →
:mod:`~foldgroup.training.distributed` (which processes take part) → :mod:`~foldgroup.training.data` (images, checked,
split and dealt) → :mod:`~foldgroup.training.step` (one update) → :mod:`~foldgroup.training.loop` (epochs) →
:mod:`~foldgroup.training.state` (what a run goes on from) and :mod:`~foldgroup.training.logs`.
"""

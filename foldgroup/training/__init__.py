"""The trainer: the paper's recipe on a folder of images, on one process or many, seeded and resumable. Prints nothing.

In the order a run goes: :mod:`~foldgroup.training.config` (settings and recipes) →
:mod:`~foldgroup.training.distributed` (which processes take part) → :mod:`~foldgroup.training.data` (images, checked,
split and dealt) → :mod:`~foldgroup.training.step` (one update) → :mod:`~foldgroup.training.loop` (epochs) →
:mod:`~foldgroup.training.state` (what a run goes on from), :mod:`~foldgroup.training.logs` and
:mod:`~foldgroup.training.deployment` (the bundle at the end). Groups may be given (:mod:`~foldgroup.training.fixed`),
and a checkpoint may be trained on in folded form (:mod:`~foldgroup.training.refine`).
"""

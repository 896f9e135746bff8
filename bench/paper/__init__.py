"""The paper's studies, on real images, at the scale that is at hand (:mod:`bench.paper.scales`).

    python -m bench.paper train --scale two-cores --images CIFAR10      # every network of every study; resumable
    python -m bench.paper latency --scale two-cores                     # the folded networks, timed
    python -m bench.paper tables --scale two-cores                      # tables and plots from the results

CIFAR10 is the unpacked archive of the example's images, with ``train`` and ``test``. A study is a list of points
(:mod:`bench.paper.studies`); points that several studies share are trained once. Each training run is ``foldgroup
train``'s: images of ``train`` alone, a tenth of them held out to choose the epoch that is kept. ``test`` is looked at
once, by the kept epoch.
"""

"""Which channel order every tensor gets, which shuffles stay and how many groups every layer runs: the least cost.

``problem``: the question, as a graph of sites, ties and links. ``flags``: the answers that can matter; ``domains``:
where. ``functions`` and ``elimination``: the least of a sum. ``solver``: the best plan. ``cost``: what is minimised.
Nothing here knows a network: :mod:`foldgroup.channels` asks the question.
"""

"""Synthetic gates at a budget: exact, at random, with fewer groups in low layers."""

from __future__ import annotations

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from bench.synthetic import budget_groups

CHANNELS = [128] * 3 + [256] * 4 + [512] * 6 + [1024] * 3


def ones(channels, groups):
    return sum(c * c // g for c, g in zip(channels, groups, strict=True))


@given(
    st.lists(st.sampled_from([16, 64, 128, 512]), min_size=1, max_size=12),
    st.sampled_from([2, 4, 8, 16]),
    st.floats(0, 2),
    st.floats(0.3, 2),
    st.integers(0, 99),
)
@quick(60)
def test_the_budget_is_met_exactly_by_powers_of_two(channels, b, tendency, spread, seed):
    groups = budget_groups(channels, b, tendency=tendency, spread=spread, seed=seed)
    assert ones(channels, groups) == sum(c * c for c in channels) // b
    assert all(c % g == 0 and g & (g - 1) == 0 for c, g in zip(channels, groups, strict=True))


@pytest.mark.parametrize("b", [32, 64, 96, 128])
def test_the_papers_budgets(b):
    for seed in range(5):
        groups = budget_groups(CHANNELS, b, seed=seed)
        budget = sum(c * c for c in CHANNELS) / b
        assert ones(CHANNELS, groups) == budget if b != 96 else 0.999 * budget < ones(CHANNELS, groups) <= budget


def test_low_layers_have_fewer_groups_and_seeds_differ():
    drawn = [budget_groups(CHANNELS, 32, seed=seed) for seed in range(40)]
    assert mean(mean(groups[:3]) for groups in drawn) < 32 < mean(mean(groups[-3:]) for groups in drawn)
    assert len({tuple(groups) for groups in drawn}) > 30
    assert drawn[0] == budget_groups(CHANNELS, 32, seed=0)

"""Channel orders: how they compose, invert and lower to reshape–transpose–reshape."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import digit_orders, orders, quick

from foldgroup.channel_order import ChannelOrder, DigitOrder, as_ranges, from_ranges
from foldgroup.errors import ChannelOrderError

COUNTS = st.integers(1, 24)


def some_orders(number):
    """So many orders of one channel count."""
    return COUNTS.flatmap(lambda channels: st.tuples(*[orders(channels)] * number))


def image(channels):
    return torch.arange(2 * channels * 3).reshape(2, channels, 3, 1)


def reshape_transpose_reshape(x, order):
    n, channels, *space = x.shape
    x = x.reshape(n, *order.radices, *space)
    x = x.permute(0, *(axis + 1 for axis in order.axes), *range(1 + len(order.axes), x.ndim))
    return x.reshape(n, channels, *space)


# Composition and inverse


@given(some_orders(2))
@quick()
def test_then_is_one_indexing_after_the_other(pair):
    p, q = pair
    x = image(len(p))
    assert torch.equal(x[:, p.index][:, q.index], x[:, p.then(q).index])


@given(some_orders(3))
@quick()
def test_composition_is_associative(three):
    p, q, r = three
    assert p.then(q).then(r) == p.then(q.then(r))


@given(some_orders(1))
@quick()
def test_the_inverse_undoes_an_order_on_either_side(one):
    (p,) = one
    assert p.then(p.inverse()) == ChannelOrder.identity(len(p)) == p.inverse().then(p)
    x = image(len(p))
    assert torch.equal(x[:, p.index][:, p.inverse().index], x)


@given(some_orders(2))
@quick()
def test_the_inverse_of_a_composition_is_the_inverses_in_reverse(pair):
    p, q = pair
    assert p.then(q).inverse() == q.inverse().then(p.inverse())


@given(some_orders(1))
@quick()
def test_the_identity_changes_nothing(one):
    (p,) = one
    identity = ChannelOrder.identity(len(p))
    assert identity.is_identity
    assert p.then(identity) == p == identity.then(p)
    assert p.is_identity == (p == identity)


def test_position_i_holds_source_channel_i():
    order = ChannelOrder((2, 0, 1))
    assert torch.tensor([[10, 20, 30]])[:, order.index].tolist() == [[30, 10, 20]]
    assert (len(order), list(order)) == (3, [2, 0, 1])
    assert order.index.dtype == torch.int64


# Digits


@given(digit_orders())
@quick()
def test_a_digit_order_is_reshape_transpose_reshape(case):
    radices, axes = case
    order = ChannelOrder.from_digits(radices, axes)
    x = image(math.prod(radices))
    assert torch.equal(x[:, order.index], reshape_transpose_reshape(x, DigitOrder(radices, axes)))


@given(digit_orders())
@quick(100)
def test_as_digits_reproduces_the_order_in_no_more_digits(case):
    order = ChannelOrder.from_digits(*case)
    found = order.as_digits()
    assert found is not None
    assert ChannelOrder.from_digits(found.radices, found.axes) == order
    assert len(found.radices) <= sum(n > 1 for n in case[0])


def ordered_factorizations(n):
    """Every way to write n as a product of factors above 1, in every order."""
    yield from ((d, *rest) for d in range(2, n + 1) if n % d == 0 for rest in ordered_factorizations(n // d))
    if n == 1:
        yield ()


@cache
def fewest_digits(channels):
    """Every digit order of so many channels, with the fewest digits that express it."""
    fewest = {}
    for radices in sorted(ordered_factorizations(channels), key=len):
        for axes in itertools.permutations(range(len(radices))):
            fewest.setdefault(ChannelOrder.from_digits(radices, axes), len(radices))
    return fewest


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 12, 16, 24, 36])
def test_as_digits_is_the_shortest_of_all(channels):
    for order, fewest in fewest_digits(channels).items():
        assert len(order.as_digits().radices) == fewest


def test_as_digits_finds_a_digit_order_exactly_where_there_is_one():
    for source in itertools.permutations(range(6)):
        order = ChannelOrder(source)
        assert (order.as_digits() is not None) == (order in fewest_digits(6))


@given(st.sampled_from([8, 12, 16]).flatmap(orders))
@quick()
def test_a_random_permutation_is_a_digit_order_only_if_one_equals_it(order):
    assert (order.as_digits() is not None) == (order in fewest_digits(len(order)))


@given(st.sampled_from([3, 5, 7, 11, 13]).flatmap(orders))
@quick()
def test_a_prime_number_of_channels_has_no_digit_order_but_the_identity(order):
    assert (order.as_digits() is not None) == order.is_identity


def test_a_swap_of_two_channels_is_no_digit_order():
    assert ChannelOrder((1, 0, *range(2, 64))).as_digits() is None


def test_the_shuffle_of_two_groups_of_four_is_two_digits():
    order = ChannelOrder((0, 4, 1, 5, 2, 6, 3, 7))
    assert order.as_digits() == DigitOrder(radices=(2, 4), axes=(1, 0))


def test_neighbouring_digits_that_stay_together_are_merged():
    order = ChannelOrder.from_digits((2, 3, 2, 2), (2, 3, 0, 1))
    assert order.as_digits() == DigitOrder(radices=(6, 4), axes=(1, 0))


# What is no order


@pytest.mark.parametrize("source", [(0, 0), (1, 2), (-1, 0), (0, 2, 2), (3, 0, 1)])
def test_what_is_no_permutation_is_refused(source):
    with pytest.raises(ChannelOrderError, match=f"not a permutation of {len(source)} channels"):
        ChannelOrder(source)


@given(COUNTS.flatmap(lambda c: st.lists(st.integers(-1, c), min_size=c, max_size=c)))
@quick()
def test_exactly_the_permutations_are_accepted(source):
    if sorted(source) == list(range(len(source))):
        assert list(ChannelOrder(tuple(source))) == source
    else:
        with pytest.raises(ChannelOrderError):
            ChannelOrder(tuple(source))


def test_orders_of_different_channel_counts_do_not_compose():
    with pytest.raises(ChannelOrderError, match="an order of 3 channels cannot precede one of 4"):
        ChannelOrder.identity(3).then(ChannelOrder.identity(4))


@pytest.mark.parametrize("axes", [(0,), (0, 0), (0, 1, 2), (-1, 0), (1, 2)])
def test_axes_that_do_not_list_every_digit_once_are_refused(axes):
    with pytest.raises(ChannelOrderError, match="do not list each of the 2 digits once"):
        ChannelOrder.from_digits((2, 3), axes)


@given(st.lists(st.integers(0, 30)))
def test_channel_numbers_as_text_are_read_back(channels: list[int]) -> None:
    assert from_ranges(as_ranges(channels)) == tuple(channels)


def test_channels_in_a_row_are_a_range() -> None:
    assert as_ranges([4, 5, 6, 9, 0, 1, 3, 2]) == "4-6 9 0-1 3 2"

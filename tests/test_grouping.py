"""The algebra of bits, masks and groupings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import digits, factored_bits, mask_by_digits, quick

from foldgroup.channel_order import ChannelOrder
from foldgroup.errors import FoldgroupError, GroupingError
from foldgroup.grouping import Grouping, factorize, kronecker_mask, prime_factors

ONE, EYE = np.ones((2, 2)), np.eye(2)
TWOS = ((2, 2),) * 3


def kron(*blocks):
    mask = np.ones((1, 1))
    for block in blocks:
        mask = np.kron(mask, block)
    return mask.astype(bool)


# Properties, for any list of factors


@given(factored_bits())
@quick(100)
def test_bits_to_mask_to_grouping_to_mask_is_the_identity(case):
    mask = kronecker_mask(*case)
    assert np.array_equal(Grouping.from_mask(mask).mask, mask)


@given(factored_bits())
@quick(100)
def test_bits_and_their_mask_give_the_very_same_grouping(case):
    assert Grouping.from_bits(*case) == Grouping.from_mask(kronecker_mask(*case))


@given(factored_bits())
@quick()
def test_channels_connect_iff_they_agree_in_every_zero_bit_digit(case):
    assert np.array_equal(kronecker_mask(*case), mask_by_digits(*case))
    assert np.array_equal(Grouping.from_bits(*case).mask, mask_by_digits(*case))


@given(factored_bits(rectangles=False))
@quick()
def test_two_channels_share_a_group_iff_they_agree_in_every_zero_bit_digit(case):
    factors, bits = case
    grouping = Grouping.from_bits(factors, bits)
    group = np.array(grouping.in_order.inverse().source) // grouping.in_width
    named = digits(tuple(n for n, _ in factors))[[k for k, bit in enumerate(bits) if bit == 0]]
    agree = (named[:, :, None] == named[:, None, :]).all(axis=0)
    assert np.array_equal(group[:, None] == group[None, :], agree)


@given(factored_bits())
@quick()
def test_group_count_is_the_product_of_the_zero_bit_factors(case):
    factors, bits = case
    grouping = Grouping.from_bits(factors, bits)
    assert grouping.groups == math.prod(a for (a, _), bit in zip(factors, bits, strict=True) if bit == 0)
    assert grouping.in_channels == math.prod(a for a, _ in factors)
    assert grouping.out_channels == math.prod(b for _, b in factors)


@given(factored_bits())
@quick()
def test_every_row_and_column_of_the_mask_sums_to_a_group_width(case):
    factors, bits = case
    grouping, mask = Grouping.from_bits(factors, bits), kronecker_mask(factors, bits)
    assert set(mask.sum(axis=1)) == {grouping.out_width} == {math.prod(b for (_, b), g in zip(*case, strict=True) if g)}
    assert set(mask.sum(axis=0)) == {grouping.in_width} == {math.prod(a for (a, _), g in zip(*case, strict=True) if g)}


@given(factored_bits())
@quick()
def test_the_orders_make_the_mask_block_diagonal(case):
    grouping = Grouping.from_bits(*case)
    reordered = kronecker_mask(*case)[np.ix_(grouping.in_order.source, grouping.out_order.source)]
    blocks = np.kron(np.eye(grouping.groups), np.ones((grouping.in_width, grouping.out_width)))
    assert np.array_equal(reordered, blocks)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
@quick()
def test_equal_groups_of_any_origin_are_found(groups, in_width, out_width, data):
    ins = data.draw(st.permutations(range(groups * in_width)))
    outs = data.draw(st.permutations(range(groups * out_width)))
    mask = np.kron(np.eye(groups), np.ones((in_width, out_width)))[np.ix_(ins, outs)]
    grouping = Grouping.from_mask(mask)
    assert (grouping.groups, grouping.in_width, grouping.out_width) == (groups, in_width, out_width)
    assert list(grouping.in_order.source[::in_width]) == sorted(grouping.in_order.source[::in_width])
    assert np.array_equal(grouping.mask, mask)


@given(st.integers(1, 300))
@quick()
def test_prime_factors_are_ascending_primes_whose_product_is_the_number(n):
    primes = prime_factors(n)
    assert math.prod(primes) == n
    assert list(primes) == sorted(primes)
    assert all(p > 1 and all(p % d for d in range(2, p)) for p in primes)


@given(st.integers(1, 300), st.integers(1, 300))
@quick()
def test_factorize_gives_prime_squares_and_at_most_one_rectangle_which_is_last(c_in, c_out):
    factors = factorize(c_in, c_out)
    assert (math.prod(a for a, _ in factors), math.prod(b for _, b in factors)) == (c_in, c_out)
    square = [a for a, b in factors if a == b]
    assert tuple(square) == prime_factors(math.gcd(c_in, c_out))
    assert [a != b for a, b in factors] == [False] * len(square) + [True] * (c_in != c_out)


# The paper's examples (section 3.2 and figure 3)


@pytest.mark.parametrize(
    ("bits", "groups", "mask"),
    [
        pytest.param((1, 1, 0), 2, kron(ONE, ONE, EYE), id="g=110: 1⊗1⊗I, figure 3e"),
        pytest.param((0, 1, 0), 4, kron(EYE, ONE, EYE), id="g=010: I⊗1⊗I, figure 3c"),
        pytest.param((0, 0, 1), 4, kron(EYE, EYE, ONE), id="g=001: neighbours, figure 3d"),
        pytest.param((1, 1, 1), 1, np.ones((8, 8), dtype=bool), id="g=111: dense, figure 3a"),
        pytest.param((0, 0, 0), 8, np.eye(8, dtype=bool), id="g=000: depthwise, figure 3b"),
    ],
)
def test_paper_examples(bits, groups, mask):
    grouping = Grouping.from_bits(TWOS, bits)
    assert grouping.groups == groups
    assert np.array_equal(grouping.mask, mask)
    assert np.array_equal(kronecker_mask(TWOS, bits), mask)


def test_the_first_digit_is_the_most_significant():
    grouping = Grouping.from_bits(TWOS, (1, 1, 0))  # the last digit names the group: even and odd channels
    assert grouping.in_order.source == (0, 2, 4, 6, 1, 3, 5, 7) == grouping.out_order.source


def test_leading_zero_bits_need_no_reordering():
    grouping = Grouping.from_bits(TWOS, (0, 0, 1))
    assert grouping.in_order.is_identity
    assert grouping.out_order.is_identity


def test_a_rectangle_makes_the_channel_counts_differ():
    grouping = Grouping.from_bits(((2, 2), (1, 3)), (0, 1))
    assert (grouping.groups, grouping.in_width, grouping.out_width) == (2, 1, 3)
    assert grouping.mask.astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


def test_the_paper_s_factors_and_a_mixed_radix():
    assert factorize(8, 8) == TWOS
    assert factorize(12, 12) == ((2, 2), (2, 2), (3, 3))
    assert factorize(8, 16) == (*TWOS, (1, 2))
    assert factorize(12, 8) == ((2, 2), (2, 2), (3, 2))
    assert factorize(1, 1) == ()


def test_no_factors_are_one_channel():
    assert Grouping.from_bits((), ()) == Grouping.from_mask([[1]])
    assert kronecker_mask((), ()).tolist() == [[True]]


# What is no grouping


@pytest.mark.parametrize("use", [kronecker_mask, Grouping.from_bits])
@pytest.mark.parametrize(
    ("factors", "bits", "message"),
    [
        pytest.param(TWOS, (1, 0), "2 gate bits for 3 factors", id="too few"),
        pytest.param(TWOS, (1, 0, 1, 0), "4 gate bits for 3 factors", id="too many"),
        pytest.param(TWOS, (1, 2, 0), "gate bit 2 is 2", id="not a bit"),
        pytest.param(TWOS, (0.5, 1, 1), "gate bit 1 is 0.5", id="half: the sign of a zero gate"),
        pytest.param(TWOS, (1, 1, -1), "gate bit 3 is -1", id="a sign"),
        pytest.param(((2, 2), (2, 3)), (1, 0), "factor 2 is 2×3", id="identity of a rectangle"),
    ],
)
def test_bits_that_do_not_fit_are_refused(use, factors, bits, message):
    with pytest.raises(GroupingError, match=message):
        use(factors, bits)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param([[1, 1], [0, 1]], "not a set of equal", id="not blocks"),
        pytest.param([[1, 1, 0], [1, 1, 1], [0, 1, 1]], "not a set of equal", id="overlapping blocks"),
        pytest.param([[1, 0], [0, 1], [1, 0]], "2 groups do not divide 3 input", id="unequal inputs"),
        pytest.param([[1, 0, 1], [0, 1, 0]], "2 groups do not divide 2 input and 3 output", id="unequal outputs"),
        pytest.param(np.kron(EYE, ONE)[[0, 0, 0, 2]], "not a set of equal", id="groups of three and one"),
        pytest.param([[1, 1], [0, 0]], "not a set of equal", id="zero row"),
        pytest.param([[1, 0], [1, 0]], "not a set of equal", id="zero column"),
        pytest.param([[1, 0, 0], [0, 1, 0], [0, 0, 0]], "not a set of equal", id="zero row and column"),
        pytest.param(np.zeros((4, 4)), "not a set of equal", id="all zeros"),
        pytest.param(np.zeros((0, 0)), "shape", id="empty"),
        pytest.param([1, 1], "shape", id="a vector"),
        pytest.param([[1, 0.5], [0.5, 1]], "not binary", id="half: the mask of a zero gate"),
        pytest.param([[1, math.nan], [0, 1]], "not binary", id="not a number"),
    ],
)
def test_masks_that_are_no_equal_groups_are_refused(mask, message):
    with pytest.raises(GroupingError, match=message):
        Grouping.from_mask(mask)


@given(factored_bits().filter(lambda case: 0 in case[1]), st.data())
@quick()
def test_one_flipped_entry_is_always_noticed(case, data):
    mask = kronecker_mask(*case)
    i = data.draw(st.integers(0, mask.shape[0] - 1))
    o = data.draw(st.integers(0, mask.shape[1] - 1))
    mask[i, o] = not mask[i, o]
    with pytest.raises(GroupingError):
        Grouping.from_mask(mask)


@pytest.mark.parametrize(("groups", "c_in", "c_out"), [(0, 4, 4), (3, 4, 6), (3, 6, 4)])
def test_group_counts_that_do_not_divide_the_channels_are_refused(groups, c_in, c_out):
    with pytest.raises(GroupingError, match=f"{groups} groups do not divide {c_in} input and {c_out} output channels"):
        Grouping(groups, ChannelOrder.identity(c_in), ChannelOrder.identity(c_out))


def test_a_grouping_error_ends_the_command_with_status_2():
    assert issubclass(GroupingError, FoldgroupError)
    assert GroupingError.exit_status == 2

"""The measures on hand-made series with known answers."""

import math

import pytest

from ceu_rl.stability import measures


def test_a_spike_is_over_ten_times_the_median_of_what_came_before():
    calm = [1.0, 2.0, 1.0, 2.0, 1.0]
    assert measures.spikes([*calm, 10.0]) == []  # the median before is 1, and 10 is not over 10
    assert measures.spikes([*calm, 10.1]) == [5]
    assert measures.spikes([*calm, 10.1, 14.0, 21.0]) == [5, 7]  # the medians are 1.5 and 2
    assert measures.spikes([100.0, *calm]) == []  # nothing to compare the first one with
    assert measures.spikes([*calm, 5.0], factor=4.0) == [5]


def test_a_spike_counts_in_the_median_of_the_next_only_within_the_window():
    values = [1.0] * 10 + [50.0] * 3 + [20.0]
    assert measures.spikes(values) == [10, 11, 12, 13]
    assert measures.spikes(values, window=5) == [10, 11, 12]  # by then 3 of the last 5 are 50
    assert measures.spikes([*[1.0] * 5, math.nan, math.inf, 11.0]) == [7]  # what is not finite is no part of it


def test_a_loss_spike_is_ten_deviations_over_the_median():
    around_zero = [-0.1, 0.1, -0.1, 0.1, 0.0]  # median 0, median absolute deviation 0.1
    assert measures.loss_spikes([*around_zero, 0.99]) == []
    assert measures.loss_spikes([*around_zero, 1.01]) == [5]
    assert measures.loss_spikes([0.5] * 5 + [0.509]) == []  # the deviation counts as 1e-3 at least
    assert measures.loss_spikes([0.5] * 5 + [0.511]) == [5]
    assert measures.loss_spikes([*around_zero, -50.0]) == []  # a fall is none


def test_non_finite():
    assert measures.non_finite([1.0, math.nan, -math.inf, 0.0]) == [1, 2]


def test_displacement_depth_and_change():
    assert measures.displacement([-3.0, -1.0, -9.0], tokens=3.0) == -2.0
    assert measures.depth([-3.0, -9.0], tokens=3.0) == 3.0
    assert measures.change([1.5, 7.0, 1.0]) == -0.5


def test_drawdown_is_the_largest_fall_from_the_best_so_far():
    assert measures.drawdown([0.5, 0.9, 0.4, 1.0, 0.8]) == pytest.approx(0.5)
    assert measures.drawdown([0.1, 0.2, 0.3]) == 0.0
    assert measures.drawdown([]) == 0.0


def test_collapse_is_the_start_of_the_last_stay_below_half_of_the_best():
    steps = [0, 10, 20, 30, 40]
    assert measures.collapse_step(steps, [0.8, 0.3, 0.7, 0.3, 0.2]) == 30  # 0.3 at step 10 was made up
    assert measures.collapse_step(steps, [0.8, 0.4, 0.4, 0.4, 0.4]) is None  # half is not below half
    assert measures.collapse_step(steps, [0.8, 0.9, 0.9, 0.9, 0.1]) == 40


GRID = {1e-5: [0.99, 0.96], 1e-4: [0.97, 0.95], 1e-3: [0.99, 0.90], 1e-2: [1.0, math.nan]}


def test_stable_range_on_a_hand_made_grid():
    assert measures.stable_range(GRID, base=1.0) == 1e-4  # 0.95 is kept; 0.90 and NaN are not
    assert measures.stable_range(GRID, base=0.9) == 1e-3
    assert measures.stable_range(GRID, base=1.0, keep=0.99) is None
    assert measures.stable_range({}, base=1.0) is None
    assert measures.stable_range({1e-5: []}, base=1.0) is None  # no seed has kept anything


def test_range_ratio():
    stock = {1e-6: [1.0, 1.0], 1e-5: [1.0, 0.5]}
    assert measures.range_ratio(GRID, stock, base=1.0) == pytest.approx(100.0)
    nowhere = {1e-5: [0.1, 0.1], 1e-4: [0.1, 0.1]}
    assert measures.range_ratio(GRID, nowhere, base=1.0) == pytest.approx(10.0)  # as if stable at its lowest, 1e-5


def test_the_interval_of_the_ratio_draws_the_same_seeds_for_both_arms():
    """Two seeds give the resamples (0, 0), (0, 1) twice and (1, 1); worked by hand for each."""
    ours = {1e-5: [1.0, 1.0], 1e-4: [1.0, 0.5]}  # 1e-4 for seed 0 alone, else 1e-5
    stock = {1e-5: [1.0, 1.0], 1e-4: [0.5, 1.0]}  # 1e-4 for seed 1 alone, else 1e-5
    low, high = measures.range_ratio_interval(ours, stock, base=1.0)
    assert (low, high) == (pytest.approx(0.1), pytest.approx(10.0))
    assert measures.range_ratio_interval(ours, ours, base=1.0) == (1.0, 1.0)  # drawn apart, it would be 0.1 to 10
    assert measures.range_ratio_interval({1e-5: [1.0]}, {1e-5: [1.0]}, base=1.0) is None
    with pytest.raises(ValueError, match=r"\[1, 2\] seeds"):
        measures.range_ratio_interval({1e-5: [1.0]}, stock, base=1.0)


def test_bootstrap_interval():
    assert measures.bootstrap_interval([0.7]) is None
    assert measures.bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    low, high = measures.bootstrap_interval([0.0, 1.0, 2.0])
    assert (low, high) == (0.0, 2.0)  # each end has a probability of 1/27, more than 2.5 %
    many = measures.bootstrap_interval(range(400))
    # The normal theory: 199.5 +- 1.96 * 115.47 / 20
    assert many == (pytest.approx(188.2, abs=1.5), pytest.approx(210.8, abs=1.5))


def test_median_ratio():
    assert measures.median_ratio([1.0, 3.0, 100.0], [2.0, 1.0, 2.0]) == 1.5


def test_pareto_front():
    points = [(0.1, 0.9), (0.5, 0.5), (0.4, 0.4), (0.9, 0.1), (0.5, 0.4)]
    assert measures.pareto_front(points) == [0, 1, 3]
    assert measures.pareto_front([(0.5, 0.5), (0.5, 0.5)]) == [0, 1]  # equal points do not beat each other
    assert measures.pareto_front([]) == []

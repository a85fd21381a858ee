"""Intervals against SciPy and by hand, and how often they cover the truth."""

import functools
import math

import numpy as np
import pytest
import scipy.stats

from dpo_jax.winrates import intervals

SCORES = np.asarray([0.0, 0.5, 1.0])


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(confidence):
  for wins, n in (0, 1), (1, 1), (0, 40), (40, 40), (33, 150), (999, 1000):
    ours = intervals.wilson(wins, n, confidence=confidence)
    test = scipy.stats.binomtest(wins, n)
    theirs = test.proportion_ci(confidence_level=confidence, method="wilson")
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_wilson_of_nothing_is_everything():
  assert intervals.wilson(0, 0, confidence=0.95) == (0.0, 1.0)
  with pytest.raises(ValueError, match="successes=3"):
    intervals.wilson(3, 2, confidence=0.95)


def test_effective_wilson_by_hand():
  # Scores 0, 1/2, 1/2, 1: mean 1/2, s^2 = (1/4 + 1/4) / 3 = 1/6, so that the
  # mean varies like that of 1/4 / (1/6) * 4 = 6 binary scores.
  units = [0.0, 0.5, 0.5, 1.0]
  t = 3.182446305284263  # 97.5% quantile of Student's t, 3 degrees
  half = t * math.sqrt(0.25 / 6 + t**2 / (4 * 36)) / (1 + t**2 / 6)
  low, high = intervals.effective_wilson(units, confidence=0.95)
  assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-12)
  # Where nothing varies, n itself is taken.
  assert intervals.effective_wilson([1, 1, 1], confidence=0.9) == (
    intervals.wilson(3, 3, confidence=0.9)
  )
  assert intervals.effective_wilson([], confidence=0.9) == (0.0, 1.0)


def percentile(units, settings):
  """The plain bootstrap interval: quantiles of the resampled means."""
  tail = (1 - settings.confidence) / 2
  means = intervals.resampled_means(units, settings)
  return np.quantile(means, [tail, 1 - tail])


def samples():
  generator = np.random.default_rng(3)
  return {
    "even": generator.choice([0, 0.25, 0.5, 1], size=200),
    "skewed": generator.choice(SCORES, size=120, p=[0.85, 0.1, 0.05]),
    "continuous": generator.beta(0.3, 2.0, size=60),
  }


@pytest.mark.parametrize(
  ("name", "method"),
  [("even", "BCa"), ("skewed", "percentile"), ("continuous", "BCa")],
)
def test_the_bootstrap_agrees_with_scipy(name, method):
  units = samples()[name]
  settings = intervals.Settings(1, 40000, 0.9)
  if method == "BCa":
    found = intervals.bca(units, settings)
    ours = (found.low, found.high)
  else:
    ours = percentile(units, settings)
  theirs = scipy.stats.bootstrap(
    (units,),
    np.mean,
    n_resamples=40000,
    confidence_level=0.9,
    method=method,
    rng=np.random.default_rng(2),
  ).confidence_interval
  # Two sets of resamples: each end is known to about 0.01 standard errors, and
  # to one step of the grid of possible means.
  error = units.std() / math.sqrt(len(units))
  step = {"even": 0.25, "skewed": 0.5, "continuous": 0}[name] / len(units)
  np.testing.assert_allclose(ours, theirs, atol=0.06 * error + step)


def test_bca_shifts_a_skewed_interval_to_the_long_side():
  units = samples()["skewed"]
  settings = intervals.Settings(resamples=20000)
  plain = percentile(units, settings)
  found = intervals.bca(units, settings)
  assert found.low > plain[0]
  assert found.high > plain[1]


def test_rounding_decides_no_tie_of_bca():
  # Means of thirds equal the mean of all but for their rounding; those of
  # whole numbers are exact.
  whole = np.random.default_rng(3).choice(7, size=150)
  found = intervals.bca(whole / 6, intervals.Settings())
  exact = intervals.bca(whole, intervals.Settings())
  assert (6 * found.low, 6 * found.high) == pytest.approx(
    (exact.low, exact.high), rel=1e-9
  )


@pytest.mark.parametrize(
  ("units", "single", "method"),
  [
    ([1, 0, 1], True, "wilson"),
    ([1, 1, 1], True, "wilson"),
    ([], True, "wilson bound"),
    ([1, 1, 1], False, "wilson bound"),
    ([0.5] * 500, True, "wilson bound"),
    ([1, 0.5, 0], True, "wilson effective"),
    ([1, 0] * 49, False, "wilson effective"),
    ([0.5] * 481 + [1] * 19, False, "wilson effective"),
    ([0.5] * 480 + [1] * 20, False, "bca"),
    ([1, 0] * 50, False, "bca"),
  ],
)
def test_the_method_fits_the_scores(units, single, method):
  found = intervals.of_rate(
    units, intervals.Settings(resamples=500), single=single
  )
  assert found.method == method
  assert 0 <= found.low <= found.high <= 1
  if units:
    assert found.low <= np.mean(units) <= found.high
    assert found.high - found.low > 0.005


@pytest.mark.parametrize("n", [5, 400])
def test_an_interval_of_differences_is_that_of_rates_stretched(n):
  settings = intervals.Settings(seed=4, resamples=1000)
  units = np.random.default_rng(0).choice([-1, -0.5, 0, 0.5, 1], size=n)
  found = intervals.of_mean(units, settings, bound=1.0)
  rate = intervals.of_rate((units + 1) / 2, settings)
  assert found.low == pytest.approx(2 * rate.low - 1)
  assert found.high == pytest.approx(2 * rate.high - 1)
  wide = intervals.of_mean(3 * units, settings, bound=3.0)
  assert wide.low == pytest.approx(3 * found.low)
  if n > 100:
    t = scipy.stats.ttest_1samp(units, 0).confidence_interval(0.95)
    # The resamples know an end to about 4% of the half width.
    half = (t.high - t.low) / 2
    assert (found.low, found.high) == pytest.approx(tuple(t), abs=0.1 * half)


@pytest.mark.parametrize(
  ("resamples", "confidence", "message"),
  [(0, 0.95, "resamples=0"), (2000, 95, "confidence=95")],
)
def test_settings_out_of_range_are_refused(resamples, confidence, message):
  with pytest.raises(ValueError, match=message):
    intervals.Settings(0, resamples, confidence)


@functools.cache
def interval_of(zeros, halves, ones, single):
  units = np.repeat(SCORES, [zeros, halves, ones])
  return intervals.of_rate(units, intervals.Settings(), single=single)


def chances(rate, split):
  """Chances of the scores 0, 1/2, 1 with `split` of the halves possible."""
  half = split * 2 * min(rate, 1 - rate)
  return np.asarray([1 - rate - half / 2, half, rate - half / 2])


def coverage(n, rate, split, *, single=False, trials=0):
  """How often the 95% interval of n prompts holds the rate.

  Exact, over all tables of n scores, or over `trials` drawn ones.
  """
  p = chances(rate, split)
  if trials:
    generator = np.random.default_rng(int(1e6 * rate + 1e3 * split) + n)
    tables, times = np.unique(
      generator.multinomial(n, p, size=trials), axis=0, return_counts=True
    )
    weights = times / trials
  else:
    tables = np.asarray(
      [(z, h, n - z - h) for z in range(n + 1) for h in range(n + 1 - z)]
    )
    weights = scipy.stats.multinomial.pmf(tables, n, p)
    # Tables that hardly ever happen cost time and change nothing.
    kept = weights > 1e-7
    tables, weights = tables[kept], weights[kept]
  held = 0.0
  for table, weight in zip(tables, weights):
    found = interval_of(*map(int, table), single)
    held += weight * (found.low - 1e-12 <= rate <= found.high + 1e-12)
  return held


# At these splits the possible means are not so coarse that the coverage jumps
# with the rate; see the test of coarse ones.
@pytest.mark.parametrize("split", [0.25, 0.5])
@pytest.mark.parametrize(
  ("n", "rates"), [(20, (0.1, 0.2, 0.5, 0.9)), (50, (0.1, 0.7))]
)
def test_few_prompts_are_covered_as_often_as_is_said(n, rates, split):
  for rate in rates:
    assert 0.93 <= coverage(n, rate, split) <= 0.98, rate


@pytest.mark.parametrize(("rate", "split"), [(0.1, 0.25), (0.5, 0.5), (0.8, 0)])
def test_many_prompts_are_covered_as_often_as_is_said(rate, split):
  # 1,000 draws know 95% to 0.7 points.
  assert 0.93 <= coverage(150, rate, split, trials=1000) <= 0.97


def test_the_plain_bootstrap_would_not_do_for_few_prompts(monkeypatch):
  def plain(units, *, confidence):
    return percentile(units, intervals.Settings(confidence=confidence))

  interval_of.cache_clear()
  monkeypatch.setattr(intervals, "effective_wilson", plain)
  assert coverage(20, 0.1, 0.25) < 0.925
  interval_of.cache_clear()


def test_ten_prompts_are_covered_at_least_as_often():
  for rate in (0.1, 0.3, 0.5):
    assert coverage(10, rate, 0.5) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 50, 100, 150, 256])
def test_coverage_of_both_orders_over_the_whole_grid(n):
  found = {
    (rate, split): coverage(n, rate, split, trials=0 if n <= 50 else 4000)
    for rate in np.arange(1, 10) / 10
    for split in (0.0, 0.25, 0.5, 0.9)
  }
  # A coarse grid of means (all but a few scores are 1/2, or none is) holds the
  # truth more often than is said, never much less.
  low, high = min(found.values()), max(found.values())
  assert low >= 0.93
  assert high <= (0.99 if n <= 20 else 0.98)
  assert 0.94 <= np.mean(list(found.values())) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 20, 50, 150, 256])
def test_coverage_of_one_order_over_the_whole_grid(n):
  for rate in np.arange(1, 10) / 10:
    wins = np.arange(n + 1)
    weights = scipy.stats.binom.pmf(wins, n, rate)
    held = 0.0
    for won, weight in zip(wins, weights):
      found = interval_of(n - int(won), 0, int(won), True)
      held += weight * (found.low - 1e-12 <= rate <= found.high + 1e-12)
    # Wilson's own coverage, which jumps with the rate.
    assert 0.92 <= held <= 0.985, rate


def difference_coverage(n, p, trials):
  """How often the 95% interval of n differences -1, ..., 1 holds their mean."""
  values = np.asarray([-1, -0.5, 0, 0.5, 1])
  truth = float(values @ p)
  generator = np.random.default_rng(n)
  held = 0
  tables, times = np.unique(
    generator.multinomial(n, p, size=trials), axis=0, return_counts=True
  )
  for table, count in zip(tables, times):
    found = intervals.of_mean(
      np.repeat(values, table), intervals.Settings(), bound=1.0
    )
    held += count * (found.low - 1e-12 <= truth <= found.high + 1e-12)
  return held / trials


ALIKE = (0.02, 0.05, 0.83, 0.06, 0.04)
SPREAD = (0.1, 0.15, 0.25, 0.2, 0.3)


@pytest.mark.parametrize(
  ("n", "p"),
  [(30, SPREAD), pytest.param(150, ALIKE, marks=pytest.mark.slow)],
)
def test_differences_are_covered_as_often_as_is_said(n, p):
  # 1,000 draws know 95% to 0.7 points.
  assert 0.93 <= difference_coverage(n, p, 1000) <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize("p", [ALIKE, SPREAD])
@pytest.mark.parametrize("n", [20, 50, 150, 256])
def test_coverage_of_differences_over_sizes(n, p):
  assert 0.93 <= difference_coverage(n, p, 4000) <= 0.98


def test_the_detectable_difference_by_hand():
  # Student's t of 149 degrees 1.97601, the resamples' 0.06, and 0.84162 for
  # 80%, times sqrt(1 / 300); and half a step of the means, 1 / 300.
  found = intervals.detectable_difference(150)
  assert found == pytest.approx(2.87763 / math.sqrt(300) + 1 / 300, abs=1e-6)
  # Of 5 prompts: (2.77645 + 0.84162) * sqrt(0.1) + 0.1 is more than 1.
  assert [intervals.detectable_difference(n) for n in (0, 1, 5)] == [None] * 3
  assert intervals.detectable_difference(20) < 0.5


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in (75, 150, 256)]


def power(n, p, values):
  """How often the 95% interval of n differences is above 0.

  Exact over all tables of the three values, each with a seed of its own.
  """
  first = np.arange(n + 1)
  tables = np.stack(np.meshgrid(first, first, indexing="ij"), -1).reshape(-1, 2)
  tables = np.column_stack([tables, n - tables.sum(axis=1)])
  tables = tables[tables[:, 2] >= 0]
  weights = scipy.stats.multinomial.pmf(tables, n, p)
  kept = weights > 3e-5
  tables, weights = tables[kept], weights[kept]
  found = [
    intervals.of_mean(
      np.repeat(values, table), intervals.Settings(seed), bound=1.0
    ).low
    > 0
    for seed, table in enumerate(tables)
  ]
  return weights[found].sum() / weights.sum()


@pytest.mark.parametrize("n", [30, 100, *SLOW])
def test_the_detectable_difference_has_a_power_of_80_percent(n):
  upper = (1 + intervals.detectable_difference(n)) / 2
  lower = 1 - upper
  chance = [lower**2, 2 * upper * lower, upper**2]
  # A seed for each table leaves about a point of the seeds' own spread.
  assert 0.8 <= power(n, chance, [-1.0, 0.0, 1.0]) <= 0.85


@pytest.mark.parametrize("n", [30, SLOW[1]])
def test_scores_that_agree_or_are_split_have_more_power(n):
  gap = intervals.detectable_difference(n)
  alike = [(0.4 - gap) / 2, 0.6, (0.4 + gap) / 2]
  assert power(n, alike, [-1.0, 0.0, 1.0]) > 0.85
  # One model always split, the other won or lost: half the size each time.
  split = [0.5 - gap, 0.0, 0.5 + gap]
  assert power(n, split, [-0.5, 0.0, 0.5]) > 0.95

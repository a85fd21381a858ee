"""Differences, slopes, controls and lengths, each by hand."""

import dataclasses
import fractions
import itertools
import math

import judged
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from dpo_jax.winrates import controls, intervals, paired, rates

SETTINGS = intervals.Settings(resamples=500)


def test_a_difference_of_four_prompts_by_hand():
  calls = [
    *judged.scored([0, 0, 0.5, 1], model="sft"),
    *judged.scored([1, 0.5, 0.5, 0.5], model="dpo"),
    # Prompts and temperatures of one model, and checkpoints, are in none.
    judged.call("model", "p9", model="dpo"),
    judged.call("model", "p0000", model="sft", temperature=0.25),
    *judged.scored([0, 0, 0, 0], model="dpo", step=100),
  ]
  (row,) = paired.differences(calls, SETTINGS)
  assert (row.lower, row.upper, row.temperature, row.n) == (
    "sft",
    "dpo",
    1.0,
    4,
  )
  assert row.difference == pytest.approx((1 + 0.5 + 0 - 0.5) / 4)
  assert (row.wins, row.losses) == (2, 1)
  # Two heads of three tosses or as far from even: every outcome is.
  assert row.p == row.p_holm == 1.0
  assert -1 <= row.low < row.difference < row.high <= 1


def test_models_without_a_common_prompt_have_no_difference():
  calls = [
    judged.call("model", "p0", model="sft"),
    judged.call("model", "p1", model="dpo"),
    judged.call("missing", "p0", model="dpo"),
  ]
  assert paired.differences(calls, SETTINGS) == []


def test_mcnemar_equals_scipy_on_won_or_lost_prompts():
  generator = np.random.default_rng(0)
  scores = {m: generator.integers(2, size=80) for m in ("base", "sft")}
  calls = [
    judged.call("model" if won else "chosen", f"p{i}", model=model)
    for model, row in scores.items()
    for i, won in enumerate(row)
  ]
  (row,) = paired.differences(calls, SETTINGS)
  b = int(((scores["sft"] == 1) & (scores["base"] == 0)).sum())
  c = int(((scores["sft"] == 0) & (scores["base"] == 1)).sum())
  # The exact test by its sum: twice the smaller tail of B(b + c, 1/2).
  tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
  assert row.p == pytest.approx(min(1.0, 2 * tail))
  assert row.difference == pytest.approx((b - c) / 80)


def test_pairing_narrows_the_interval_of_correlated_models():
  generator = np.random.default_rng(1)
  easy = generator.random(300)
  base = (easy > 0.5).astype(float)
  sft = (easy > 0.42).astype(float)
  calls = [
    *judged.scored(base, model="base"),
    *judged.scored(sft, model="sft"),
  ]
  (row,) = paired.differences(calls, SETTINGS)
  assert row.interval == "bca"
  unpaired = 1.96 * math.sqrt((base.var() + sft.var()) / 300)
  assert row.low > 0
  assert (row.high - row.low) / 2 < 0.5 * unpaired
  error = (sft - base).std(ddof=1) / math.sqrt(300)
  assert (row.high - row.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_holm_by_hand():
  # Sorted .01 .02 .03 .9 times 4 3 2 1, never below the one before.
  assert paired.holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx(
    [0.06, 0.04, 0.9, 0.06]
  )
  assert paired.holm([0.5, 0.5]) == [1.0, 1.0]
  assert paired.holm([]) == []


def test_holm_is_over_the_temperatures_of_a_pair():
  calls = []
  for temperature, won in ((0.25, 9), (1.0, 6)):
    fields = {"temperature": temperature}
    calls += judged.scored([0] * 10, model="base", **fields)
    calls += judged.scored([1] * won + [0] * (10 - won), model="sft", **fields)
  first, second = paired.differences(calls, SETTINGS)
  assert (first.p, second.p) == pytest.approx((2 / 2**9, 2 / 2**6))
  assert first.p_holm == pytest.approx(2 * 2 / 2**9)
  assert second.p_holm == pytest.approx(2 / 2**6)


def test_a_slope_by_hand():
  # Scores at steps 0, 10, 30 of two prompts. Deviations from the mean step
  # 40/3: -40/3, -10/3, 50/3; their squares add up to 4200/9.
  table = {0: [0, 0.5], 10: [0.5, 0.5], 30: [1, 0]}
  calls = [
    row
    for step, scores in table.items()
    for row in judged.scored(scores, step=step)
  ]
  first = (0 * -40 + 0.5 * -10 + 1 * 50) / 3 / (4200 / 9) * 30
  second = (0.5 * -40 + 0.5 * -10 + 0 * 50) / 3 / (4200 / 9) * 30
  calls.append(judged.call("model", "p9", step=0))
  (row,) = paired.beta_slopes(calls, SETTINGS)
  assert (row.n, row.left_out, row.steps) == (2, 1, 3)
  assert (row.first, row.last, row.temperatures) == (0, 30, (1.0,))
  assert row.gain == pytest.approx((first + second) / 2)
  # Student's t of one degree of freedom is Cauchy's distribution.
  t = (first + second) / abs(first - second)
  assert row.p == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)))
  assert row.low < row.gain < row.high


def test_a_slope_equals_that_of_the_rates_and_averages_temperatures():
  generator = np.random.default_rng(2)
  steps, temperatures = [100, 200, 400], [0.7, 1.0]
  scores = generator.choice([0, 0.5, 1], size=(150, 3, 2))
  calls = [
    row
    for i, step in enumerate(steps)
    for j, t in enumerate(temperatures)
    for row in judged.scored(scores[:, i, j], step=step, temperature=t)
  ]
  (row,) = paired.beta_slopes(calls, SETTINGS)
  rates = scores.mean(axis=(0, 2))
  slope = np.polyfit(steps, rates, 1)[0]
  assert row.gain == pytest.approx(slope * 300)
  assert row.interval == "bca"
  # A third temperature at one step only would tilt the line: it is left out.
  more = judged.scored([1] * 150, step=400, temperature=0.1)
  assert paired.beta_slopes([*calls, *more], SETTINGS) == [row]


def test_one_checkpoint_has_no_slope():
  assert paired.beta_slopes(judged.scored([1, 0], step=5), SETTINGS) == []
  assert paired.beta_slopes(judged.scored([1, 0]), SETTINGS) == []


def test_steps_that_never_change_have_no_p_value():
  calls = [*judged.scored([1, 0], step=1), *judged.scored([1, 0], step=2)]
  (row,) = paired.beta_slopes(calls, SETTINGS)
  assert row.gain == 0
  assert math.isnan(row.p)
  assert row.low < 0 < row.high


def test_controls_by_hand():
  calls = [
    *judged.scored([1, 0.5, 0, 0.5]),
    # A text against itself: always the first slot, and once always "model".
    judged.control("aa", "model", "p0", "model_first"),
    judged.control("aa", "chosen", "p0", "chosen_first"),
    judged.control("aa", "model", "p1", "model_first"),
    judged.control("aa", "model", "p1", "chosen_first"),
    judged.control("aa", "refusal", "p2"),
    # The right text three times of four.
    *[judged.control("gold", "model", f"p{i}") for i in range(3)],
    judged.control("gold", "chosen", "p3"),
    # p0000 as before, p0001 otherwise, p0002 not read, p0003 half as before.
    judged.call("model", "p0000", control="retest"),
    judged.call("tie", "p0001", control="retest"),
    judged.call("missing", "p0002", control="retest"),
    judged.call("model", "p0003", control="retest"),
    judged.call("model", "p0003", "chosen_first", control="retest"),
  ]
  found = controls.controls(calls, SETTINGS)
  assert (found.aa.n, found.aa.rate) == (2, 0.75)
  assert found.aa_p == 1.0
  # p0 both times, p1 once of two.
  assert (found.aa_first_slot.n, found.aa_first_slot.rate) == (2, 0.75)
  assert (found.gold.n, found.gold.rate) == (4, 0.75)
  assert (found.retest.n, found.retest.rate) == (3, pytest.approx(1.5 / 3))
  assert found.unread == 2
  for share in (found.aa, found.gold, found.retest):
    assert 0 <= share.low <= share.rate <= share.high <= 1


def test_ties_of_a_text_with_itself_are_on_no_side():
  calls = judged.scored([1])
  for index in range(13):
    verdict = "model" if index < 8 else "tie"
    calls.append(judged.control("aa", verdict, f"p{index}"))
  # An ordinary call without a verdict is no unread control.
  calls.append(judged.call("missing", "p9"))
  found = controls.controls(calls, SETTINGS)
  assert found.aa.rate == pytest.approx((8 + 5 / 2) / 13)
  assert found.aa_p == pytest.approx(2 / 2**8)
  assert found.unread == 0


def test_no_controls_are_no_crash():
  found = controls.controls(judged.scored([1]), SETTINGS)
  assert found.aa.n == found.gold.n == found.retest.n == found.unread == 0
  assert math.isnan(found.gold.rate)
  assert (found.gold.low, found.gold.high) == (0.0, 1.0)
  assert found.aa_p == 1.0


def test_the_sign_test_equals_its_sum():
  # 35 of 35, as the judge of the dpo-replication system did.
  assert controls.sign_test(35, 0) == pytest.approx(2 / 2**35)
  assert controls.sign_test(5, 5) == 1.0
  assert controls.sign_test(0, 0) == 1.0
  for above, below in [*itertools.product(range(1, 9), repeat=2), (170, 230)]:
    n = above + below
    tail = sum(math.comb(n, k) for k in range(min(above, below) + 1))
    wanted = min(1.0, float(fractions.Fraction(2 * tail, 2**n)))
    # SciPy's sums of floats.
    assert controls.sign_test(above, below) == pytest.approx(wanted, rel=1e-11)


def test_the_first_slot_share_is_over_prompts():
  calls = [
    *judged.both("model", "chosen", "p0"),  # first slot twice
    *judged.both("model", "tie", "p1"),  # first slot, and undecided
    judged.call("chosen", "p2"),  # second slot
    judged.call("tie", "p3"),  # undecided: left out
  ]
  health = controls.judge_health(calls, SETTINGS)
  assert health.first_slot_rate == 3 / 4
  assert (health.first_slot.n, health.first_slot.rate) == (3, 2 / 3)
  assert health.first_slot.low < 2 / 3 < health.first_slot.high


def test_two_lengths_give_the_mean_of_the_log_odds():
  # The response is 40 characters longer or shorter; the deviation is 40, so
  # that tanh is +-tanh(1), and the regression fits both groups' odds exactly.
  calls = [
    *[length_call(f"l{i}", i < 15, 140) for i in range(20)],
    *[length_call(f"s{i}", i < 8, 60) for i in range(20)],
  ]
  (row,) = rates.length_controlled(calls, SETTINGS)
  odds = [math.log(15 / 5), math.log(8 / 12)]
  assert row.scale == pytest.approx(40)
  assert row.rate == pytest.approx(scipy.special.expit(sum(odds) / 2))
  assert row.effect == pytest.approx((odds[0] - odds[1]) / 2 / math.tanh(1))
  assert row.longer_rate == pytest.approx((15 + 12) / 40)
  # Log-odds of 15:5 and 8:12 have variances 1/15+1/5 and 1/8+1/12; of their
  # mean a quarter of the sum, times HC1's n / (n - 2).
  error = math.sqrt((1 / 15 + 1 / 5 + 1 / 8 + 1 / 12) / 4 * 40 / 38)
  ends = sum(odds) / 2 + 1.959963984540054 * error * np.asarray([-1, 1])
  assert (row.low, row.high) == pytest.approx(tuple(scipy.special.expit(ends)))


def test_the_longer_text_is_counted_where_lengths_differ():
  # It wins p0 and p1; in p2 neither text is the longer one.
  calls = [
    length_call("p0", True, 140),
    length_call("p1", False, 60),
    length_call("p2", True, 100),
  ]
  (row,) = rates.length_controlled(calls, SETTINGS)
  assert (row.n, row.longer_rate) == (3, 1.0)


def length_call(prompt, won, chars):
  return judged.call(
    "model" if won else "chosen",
    prompt,
    response_chars=chars,
    chosen_chars=100,
  )


def test_the_logistic_fit_equals_scipy():
  generator = np.random.default_rng(5)
  gaps = generator.normal(0.3, 1, size=150)
  scores = generator.choice([0, 0.5, 1], size=150)
  scores[gaps > 1] = 1
  intercept, slope, error = rates.fit_logistic(gaps, scores)

  def loss(weights):
    odds = weights[0] + weights[1] * np.tanh(gaps)
    return np.sum(np.logaddexp(0, odds) - scores * odds)

  found = scipy.optimize.minimize(
    loss, [0, 0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}
  )
  assert (intercept, slope) == pytest.approx(tuple(found.x), abs=1e-6)
  # A sandwich error is near that of 400 refits on resampled prompts.
  refits = []
  for _ in range(400):
    drawn = generator.integers(150, size=150)
    refits.append(rates.fit_logistic(gaps[drawn], scores[drawn])[0])
  assert error == pytest.approx(np.std(refits), rel=0.15)


def test_length_says_nothing_where_scores_do_not_determine_it():
  all_won = [length_call(f"p{i}", True, 90 + i) for i in range(20)]
  one_length = [length_call(f"p{i}", i % 2, 120) for i in range(20)]
  apart = [length_call(f"p{i}", i >= 10, 90 + i) for i in range(20)]
  for calls in (all_won, one_length, apart, all_won[:2]):
    (row,) = rates.length_controlled(calls, SETTINGS)
    assert math.isnan(row.rate)
  (row,) = rates.length_controlled([judged.call("missing")], SETTINGS)
  assert row.n == 0


def test_length_control_takes_the_effect_of_length_away():
  generator = np.random.default_rng(6)
  gaps = generator.normal(80, 80, size=2000)
  truth = scipy.special.expit(-0.4 + 1.5 * np.tanh(gaps / 80))
  calls = [
    length_call(f"p{i}", generator.random() < chance, int(500 + gap))
    for i, (gap, chance) in enumerate(zip(gaps, truth))
  ]
  calls = [dataclasses.replace(row, chosen_chars=500) for row in calls]
  (row,) = rates.length_controlled(calls, SETTINGS)
  assert sum(c.verdict == "model" for c in calls) / 2000 > 0.55
  assert row.low < scipy.special.expit(-0.4) < row.high < 0.5


def test_rates_by_length_are_those_of_groups_of_prompts():
  # 40 prompts whose responses are -20 ... 19 characters longer; the longer half
  # wins. Other temperatures and checkpoints do not count.
  rows = [
    row
    for i in range(40)
    for row in judged.both(
      *["model" if i >= 20 else "chosen"] * 2,
      f"p{i:02d}",
      temperature=0.75,
      response_chars=80 + i,
      chosen_chars=100,
    )
  ]
  others = judged.both("model", "model", "p00", temperature=1.0)
  others += judged.both("model", "model", "p00", temperature=0.7, step=50)
  bins = rates.by_length([*rows, *others], SETTINGS)
  # Five groups would have 8 prompts each; four have 10.
  assert [b.n for b in bins] == [10] * 4
  assert [b.difference for b in bins] == [-15.5, -5.5, 4.5, 14.5]
  assert [b.win_rate for b in bins] == [0, 0, 1, 1]
  assert {(b.model, b.temperature) for b in bins} == {("dpo", 0.75)}
  # Wilson, 0 and 10 of 10, by SciPy's binomtest.
  for found, wins in zip(bins, (0, 0, 10, 10)):
    interval = scipy.stats.binomtest(wins, 10).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-12)

"""Win rates by hand arithmetic, and a recount of real verdicts."""

import dataclasses
import json
import math

import judged
import numpy as np
import pytest

from dpo_jax import winrates

SETTINGS = winrates.Settings()


def one(verdicts):
  """The only row of a table."""
  (rate,) = winrates.win_rates(verdicts, SETTINGS)
  return rate


def test_a_table_of_four_prompts_by_hand():
  verdicts = [
    *judged.both("model", "model", "p0"),  # 1
    *judged.both("model", "chosen", "p1"),  # 1/2, first slot both times
    *judged.both("tie", "chosen", "p2"),  # 1/4
    *judged.both("missing", "model", "p3"),  # 1 of the one that was read
    *judged.both("refusal", "missing", "p4"),  # no unit
  ]
  rate = one(verdicts)
  assert (rate.prompts, rate.n) == (5, 4)
  assert rate.win_rate == (1 + 1 / 2 + 1 / 4 + 1) / 4
  counts = (rate.wins, rate.ties, rate.losses, rate.missing, rate.refusals)
  assert counts == (4, 1, 2, 2, 1)
  # Unread calls lost or won, over all five prompts.
  assert rate.worst == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 2 + 0) / 5)
  assert rate.best == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 + 1) / 5)
  # Decided: p0 first slot then second, p1 first twice, p2 first, p3 second.
  assert rate.first_slot_rate == 4 / 6
  # Read in both orders: p0 agrees, p1 and p2 do not.
  assert rate.order_consistency == 1 / 3
  assert rate.low <= rate.win_rate <= rate.high
  health = winrates.judge_health(verdicts, SETTINGS)
  counts = (
    health.prompts,
    health.comparisons,
    health.calls,
    health.both_orders,
  )
  assert counts == (5, 5, 10, 3)
  assert (health.missing, health.refusals) == (2, 1)
  assert (health.first_slot_rate, health.order_consistency) == (4 / 6, 1 / 3)


def test_a_prompt_with_many_samples_weighs_as_much_as_one_with_few():
  many = [judged.call("model", "p0", sample=sample) for sample in range(9)]
  assert one([*many, judged.call("chosen", "p1")]).win_rate == 0.5


def test_lengths_are_averaged_over_prompts():
  calls = [
    judged.call("model", "p0", sample=0, response_chars=10),
    judged.call("model", "p0", sample=1, response_chars=30),
    judged.call("missing", "p1", response_chars=60, chosen_chars=70),
  ]
  rate = one(calls)
  assert (rate.response_chars, rate.chosen_chars) == (40.0, 60.0)


def test_rows_are_grouped_and_ordered():
  cells = [
    ("zeta", None, 1.0),
    ("dpo", 50, 0.7),
    ("dpo", None, 1.0),
    ("sft", None, 1.0),
    ("dpo", 100, 0.7),
    ("base", None, 1.0),
    ("dpo", None, 0.25),
  ]
  calls = [
    judged.call("model", model=model, step=step, temperature=temperature)
    for model, step, temperature in cells
  ]
  rates = winrates.win_rates(calls, SETTINGS)
  assert [(r.model, r.step, r.temperature) for r in rates] == [
    ("base", None, 1.0),
    ("sft", None, 1.0),
    ("dpo", None, 0.25),
    ("dpo", None, 1.0),
    ("dpo", 50, 0.7),
    ("dpo", 100, 0.7),
    ("zeta", None, 1.0),
  ]


def test_a_row_depends_on_its_own_calls_only():
  generator = np.random.default_rng(0)
  outcomes = generator.choice(["model", "tie", "chosen"], size=(160, 2))
  calls = [c for i, o in enumerate(outcomes) for c in judged.both(*o, f"p{i}")]
  alone = one(calls)
  assert one(calls[::-1]) == alone
  beside = [
    judged.call("model", model="base", temperature=t) for t in (0.25, 0.5)
  ]
  assert winrates.win_rates([*beside, *calls], SETTINGS)[-1] == alone
  (other_seed,) = winrates.win_rates(calls, winrates.Settings(seed=1))
  assert other_seed.win_rate == alone.win_rate
  assert (other_seed.low, other_seed.high) != (alone.low, alone.high)


@pytest.mark.parametrize(
  ("first", "second", "rate"),
  [("model", "model", 1), ("chosen", "chosen", 0), ("tie", "tie", 0.5)],
)
@pytest.mark.parametrize("prompts", [1, 2, 64])
def test_equal_units_still_get_an_interval(first, second, rate, prompts):
  calls = [
    c for i in range(prompts) for c in judged.both(first, second, f"p{i}")
  ]
  found = one(calls)
  assert found.win_rate == rate
  assert found.interval == "wilson bound"
  expected = winrates.wilson_interval(rate * prompts, prompts, confidence=0.95)
  assert (found.low, found.high) == expected
  assert 0 <= found.low <= found.win_rate <= found.high <= 1
  assert found.high - found.low > 0.05


def test_no_verdict_at_all_gives_no_rate_and_no_crash():
  rate = one(judged.both("missing", "refusal", "p0"))
  assert (rate.prompts, rate.n) == (1, 0)
  assert math.isnan(rate.win_rate)
  assert (rate.low, rate.high) == (0.0, 1.0)
  assert (rate.worst, rate.best) == (0.0, 1.0)
  assert math.isnan(rate.first_slot_rate)
  assert math.isnan(rate.order_consistency)
  assert winrates.win_rates([], SETTINGS) == []


def test_controls_are_in_no_win_rate():
  calls = judged.scored([1, 0.5, 0])
  controls = [
    judged.control("aa", "model"),
    judged.control("gold", "model", "p0001"),
    judged.call("chosen", "p0000", control="retest"),
  ]
  assert one([*calls, *controls]) == one(calls)
  health = winrates.judge_health([*calls, *controls], SETTINGS)
  assert (health.calls, health.comparisons) == (6, 3)
  with pytest.raises(ValueError, match="several values of judge"):
    winrates.win_rates(
      [*calls, judged.control("aa", "tie", judge="b")], SETTINGS
    )


def test_the_soft_rate_is_of_the_judges_probabilities():
  calls = [
    *judged.both("model", "chosen", "p0"),
    *judged.both("tie", "tie", "p1"),
    judged.call("missing", "p2"),
  ]
  assert math.isnan(one(calls).soft_rate)
  scores = [0.9, 0.3, None, None, None]
  rows = [
    dataclasses.replace(row, score=score) for row, score in zip(calls, scores)
  ]
  # (0.9 + 0.3) / 2, and 1/2 for identical texts, which are not asked.
  assert one(rows).soft_rate == pytest.approx((0.6 + 0.5) / 2)
  partly = [rows[0], dataclasses.replace(rows[1], score=None)]
  assert math.isnan(one(partly).soft_rate)


@pytest.mark.parametrize("field", ["judge", "template_hash"])
def test_mixed_judges_and_templates_are_refused(field):
  calls = [
    judged.call("model"),
    judged.call("model", "p1", **{field: "another"}),
  ]
  with pytest.raises(ValueError, match=f"{field}.*another"):
    winrates.win_rates(calls, SETTINGS)
  with pytest.raises(ValueError, match=f"{field}.*another"):
    winrates.judge_health(calls, SETTINGS)


def test_a_call_with_two_verdicts_is_refused():
  with pytest.raises(ValueError, match=r"more than once.*p0"):
    winrates.win_rates([judged.call("model"), judged.call("chosen")], SETTINGS)


def test_a_verdict_replaces_a_missing_one():
  again = [
    judged.call("missing", error="timeout"),
    judged.call("missing"),
    judged.call("model"),
  ]
  rate = one(again)
  assert (rate.n, rate.wins, rate.missing) == (1, 1, 0)
  assert winrates.judge_health(again, SETTINGS).calls == 1
  # A judge without a verdict is no second judge.
  assert (
    one([judged.call("missing", judge="wrong"), judged.call("model")]).wins == 1
  )
  with pytest.raises(ValueError, match="judge-1, wrong"):
    one([judged.call("missing", judge="wrong"), judged.call("model", "p1")])
  with pytest.raises(ValueError, match="more than once"):
    one([judged.call("model"), judged.call("missing")])


def test_a_verdict_on_an_edited_text_replaces_the_old():
  rows = [judged.call("model", key=key) for key in ("first", "second", "first")]
  assert winrates.current(rows) == rows[2:]
  with pytest.raises(ValueError, match="t1, t2"):
    winrates.current([*rows, judged.call("model", key="x", template_hash="t2")])


# Rate and interval in per cent, as printed in the table of shared/design.
RECOUNTED = {
  ("base", 0.25): (22.0, 16, 29),
  ("base", 0.5): (27.3, 21, 35),
  ("base", 0.75): (29.3, 23, 37),
  ("base", 1.0): (29.3, 23, 37),
  ("sft", 0.25): (29.3, 23, 37),
  ("sft", 0.5): (34.0, 27, 42),
  ("sft", 0.75): (46.7, 39, 55),
  ("sft", 1.0): (46.0, 38, 54),
  ("dpo", 0.25): (25.3, 19, 33),
  ("dpo", 0.5): (36.0, 29, 44),
  ("dpo", 0.75): (46.0, 38, 54),
  ("dpo", 1.0): (42.0, 34, 50),
}


def real_calls(shared, outcomes):
  """Judge calls of real result files; `outcomes` maps their verdict words."""
  calls = []
  for path in sorted((shared / "seed_results").glob("eval_*.json")):
    content = json.loads(path.read_text(encoding="utf-8"))
    model = path.name.removeprefix("eval_pythia-2.8b-").split("-")[0]
    calls += [
      judged.call(
        outcomes[row["verdict"]],
        str(row["sample_id"]),
        row["presentation_order"],
        model=model,
        temperature=content["metadata"]["temperature"],
        response_chars=len(row["model_response"]),
        chosen_chars=len(row["chosen_response"]),
      )
      for row in content["results"]
    ]
  return calls


def test_a_recount_of_real_verdicts_gives_the_known_table(shared):
  # The table counts wins among all 150 prompts, so a "Tie" is not a win.
  words = {"Model": "model", "Chosen": "chosen", "Tie": "chosen"}
  rates = winrates.win_rates(real_calls(shared, words), SETTINGS)
  assert [(r.model, r.temperature) for r in rates] == list(RECOUNTED)
  for rate in rates:
    assert (rate.n, rate.interval) == (150, "wilson")
    found = (
      round(100 * rate.win_rate, 1),
      round(100 * rate.low),
      round(100 * rate.high),
    )
    assert found == RECOUNTED[rate.model, rate.temperature]


def test_real_ties_that_are_parse_misses_only_widen_the_bounds(shared):
  words = {"Model": "model", "Chosen": "chosen", "Tie": "missing"}
  rates = winrates.win_rates(real_calls(shared, words), SETTINGS)
  assert sum(rate.missing for rate in rates) == 13
  for rate in rates:
    assert rate.n + rate.missing == rate.prompts == 150
    known = RECOUNTED[rate.model, rate.temperature][0]
    assert round(100 * rate.worst, 1) == known
    assert rate.best - rate.worst == pytest.approx(rate.missing / 150)
    # The model was always shown first.
    assert rate.first_slot_rate == rate.win_rate
    assert math.isnan(rate.order_consistency)

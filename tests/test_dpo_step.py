"""What the benchmark of a step computes from times and losses, by hand."""

import argparse
import json
import math

import numpy as np
import pytest

from benchmarks import (
  dpo_step,
  dpo_step_figure,
  dpo_step_jax,
  dpo_step_table,
)

LN2 = math.log(2)


def row(name, *, losses=(LN2, 0.6, 0.7, 0.5), last=(2.0, 2.0), **changed):
  return {
    "name": name,
    "model": "pythia-14m",
    "malloc": "keeping",
    "batch_size": 16,
    "seconds": [50.0, 9.0, *last],
    "losses": list(losses),
    "peak_rss_bytes": 2**30,
    "page_faults": 2_500_000,
    "user_seconds": 30.0,
    "system_seconds": 12.0,
    "tokens_a_pair": {"shared": 200.0, "apart": 300.0, "completion": 90.0},
    "machine": "2 x some processor",
  } | changed


def test_the_first_two_updates_are_not_timed():
  # 32 pairs in 4 seconds.
  assert dpo_step_table.speed(row("shared")) == 8.0


def test_the_table_gives_medians_and_their_ratio():
  rows = [row("shared"), row("shared", last=(3.0, 5.0)), row("shared")]
  text = dpo_step_table.table([*rows, row("TRL", last=(8.0, 8.0))], "shared")
  used = "| 2.50 million | 42, 12 |"
  assert "| shared | 8.00 [4.00, 8.00] | 1.00 | 1.00 GiB | 100% " + used in text
  assert "| TRL | 2.00 [2.00, 2.00] | 4.00 | 1.00 GiB | 100% " + used in text


def test_allocators_and_models_have_tables_of_their_own():
  other = row("shared", last=(1.0, 1.0), malloc="default")
  text = dpo_step_table.table([row("shared"), other], "shared")
  kept, given_back = text.split("\n\npythia-14m, memory given back: ")
  assert kept.startswith("pythia-14m, memory kept: ")
  assert "| shared | 8.00 [8.00, 8.00]" in kept
  assert "| shared | 16.00 [16.00, 16.00]" in given_back


def tried(size, *how, seconds=(9.0, 4.0), **values):
  """An attempt; its speed is 16 pairs over its second update."""
  settings = dpo_step_table.setting(size, *(how or ("sdpa", False)))
  values = {"grad_norms": [0.5, 0.7], "versions": {"trl": "1.2.3"}} | values
  return row("TRL", settings=settings, seconds=list(seconds), **values)


SEARCH = [
  tried(4, seconds=(1.0, 8.0)),
  tried(1, seconds=(9.0, 2.0), grad_norms=[0.51, 0.7]),
  tried(8, seconds=(9.0, 4.0), grad_norms=[0.50001, 0.7]),
  tried(16, refused="no memory\nat all"),
]


def test_the_fastest_settings_with_the_right_gradient_are_taken():
  assert dpo_step_table.fastest(SEARCH)["micro_batch"] == 8
  with pytest.raises(ValueError, match="TRL refuses: no memory"):
    dpo_step_table.fastest(SEARCH[3:])


@pytest.mark.parametrize(("version", "free"), [("0.24", True), ("1.2", False)])
def test_the_order_of_attempts(version, free):
  done, names = [], []
  while settings := dpo_step_table.next_attempt(done, [1, 4]):
    names.append(tuple(settings.values()))
    seconds = (1.0, 5.0 - settings["micro_batch"])
    versions = {"trl": version}
    done.append(tried(*names[-1], seconds=seconds, versions=versions))
  # Micro-batches of 4 are the faster ones, and padding-free is tried by both.
  sizes = [(1, "sdpa", free), (4, "sdpa", free)]
  others = [(4, "sdpa", True), (4, "eager", False), (4, "eager", True)]
  wanted = dict.fromkeys([(4, "sdpa", False), *sizes, *others])
  wanted = [(*one, False) for one in wanted]
  if free:
    wanted += [(4, "sdpa", False, True), (4, "sdpa", True, True)]
  assert names == wanted


@pytest.mark.parametrize(
  ("version", "seconds", "wanted"),
  [
    ("0.24", 2.0, ["TRL", "TRL, padding-free"]),
    # The fastest is padding-free itself.
    ("0.24", 9.0, ["TRL"]),
    ("1.16", 2.0, ["TRL"]),
  ],
)
def test_padding_free_is_measured_beside_a_faster_padded(
  version, seconds, wanted
):
  versions = {"versions": {"trl": version}}
  attempts = [
    tried(4, "sdpa", False, seconds=(1.0, seconds), **versions),
    tried(1, "eager", True, seconds=(1.0, 4.0), **versions),
    tried(1, "sdpa", True, seconds=(1.0, 3.0), **versions),
    # Refused, and of another gradient.
    tried(8, "sdpa", True, refused="no", **versions),
    tried(
      4, "sdpa", True, seconds=(1.0, 1.0), grad_norms=[0.6, 0.7], **versions
    ),
  ]
  found = dpo_step_table.contenders(attempts)
  assert list(found) == wanted
  free = found[wanted[-1]]["best"]
  if version == "0.24":
    assert (free["micro_batch"], free["attention"]) == (1, "sdpa")
    assert free["padding_free"]


def test_the_table_tells_what_was_tried():
  slow = row("TRL", last=(8.0, 8.0), peak_rss_bytes=2**32)
  text = dpo_step_table.table([*SEARCH, row("shared"), slow], "shared")
  assert "| TRL | 2.00 [2.00, 2.00] | 4.00 | 4.00 GiB | 25% |" in text
  assert "TRL (trl 1.2.3), pairs a second tried:" in text
  assert "micro-batches of 4, sdpa, padded: 2.00, 1.00 GiB\n" in text
  assert "micro-batches of 1, sdpa, padded: 8.00, 1.00 GiB, with an" in text
  assert "micro-batches of 16, sdpa, padded: refused: no memory" in text


def test_the_figure_shows_medians_by_case(tmp_path):
  other = row("shared", model="pythia-70m")
  bars = dpo_step_table.bars([*SEARCH, row("shared"), row("TRL"), other])
  assert bars == {
    "pythia-14m, memory kept": {"shared": (8.0, 1.0), "TRL": (8.0, 1.0)},
    "pythia-70m, memory kept": {"shared": (8.0, 1.0)},
  }
  path = dpo_step_figure.draw(bars, tmp_path / "step.png")
  assert path.read_bytes().startswith(b"\x89PNG")


def test_a_call_goes_on_where_the_last_one_ended(tmp_path):
  flags = argparse.Namespace(
    output=tmp_path / "rows.jsonl", sizes="4", rounds=2
  )
  about = {"model": "m", "malloc": "keeping", "tokens_a_pair": {"shared": 0.1}}
  names = ["shared", "TRL 1.16"]
  found = []
  while start := dpo_step.missing(flags, about, names):
    found.append(dpo_step.settings_flags(start))
    end = {"batch_size": 16, "grad_norms": [1.0], "seconds": [1.0, 1.0, 1.0]}
    with flags.output.open("a") as file:
      whole = start | end | {"versions": {"trl": "1.16"}}
      # A row of another model is never taken for this one's.
      for line in (whole, whole | {"model": "other"}):
        file.write(json.dumps(line) + "\n")
  first = ["--micro_batch=4", "--attention=sdpa"]
  rounds = [[], first, [], first]
  assert found[0] == [*first, "--search"]
  assert len(found) == 4 + len(rounds)
  assert found[4:] == rounds


@pytest.mark.parametrize(
  ("losses", "message"),
  [
    ((0.7, 0.6, 0.7, 0.5), "at step 0"),
    ((LN2, 0.6, 0.701, 0.5), "curves differ"),
  ],
)
def test_other_work_is_not_compared(losses, message):
  rows = [row("shared"), row("TRL", losses=losses)]
  with pytest.raises(ValueError, match=message):
    dpo_step_table.table(rows, "shared")


def test_padded_rows_of_the_plain_step():
  tokens, wanted = dpo_step_jax.padded([([5, 6], [7], [8, 9])], 5)
  np.testing.assert_array_equal(tokens, [[5, 6, 7, 1, 1], [5, 6, 8, 9, 1]])
  np.testing.assert_array_equal(wanted, [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0]])

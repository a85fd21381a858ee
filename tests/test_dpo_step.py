"""What the benchmark of a step computes from times and losses, by hand."""

import math

import numpy as np
import pytest

from benchmarks import dpo_step, dpo_step_figure, dpo_step_jax
from dpo_jax import figures

LN2 = math.log(2)


def row(name, *, losses=(LN2, 0.6, 0.7, 0.5), last=(2.0, 2.0)):
  return {
    "name": name,
    "model": "pythia-14m",
    "batch_size": 16,
    "seconds": [50.0, 9.0, *last],
    "losses": list(losses),
    "peak_rss_bytes": 2**30,
    "tokens_a_pair": {"shared": 200.0, "apart": 300.0, "completion": 90.0},
    "machine": "2 x some processor",
  }


def test_the_first_two_updates_are_not_timed():
  # 32 pairs in 4 seconds.
  assert dpo_step.speed(row("shared")) == 8.0


def test_the_table_gives_medians_and_their_ratio():
  rows = [row("shared"), row("shared", last=(3.0, 5.0)), row("shared")]
  text = dpo_step.table([*rows, row("TRL", last=(8.0, 8.0))])
  assert "| shared | 8.00 [4.00, 8.00] | 1.00 | 1.00 GiB |" in text
  assert "| TRL | 2.00 [2.00, 2.00] | 4.00 | 1.00 GiB |" in text


def tried(size, **values):
  settings = {"micro_batch": size, "attention": "sdpa", "padding_free": False}
  return {"settings": settings} | values


SEARCH = {
  "name": "TRL",
  "model": "pythia-14m",
  "versions": {"trl": "1.2.3"},
  "tried": [
    tried(1, speed=2.0, same=True),
    tried(4, speed=9.0, same=False),
    tried(8, speed=3.0, same=True),
    tried(16, refused="no memory\nat all"),
  ],
}


def test_the_fastest_settings_with_the_right_gradient_are_taken():
  assert dpo_step.fastest(SEARCH["tried"])["micro_batch"] == 8


def test_the_table_tells_what_was_tried():
  slow = row("TRL", last=(8.0, 8.0))
  slow["peak_rss_bytes"] = 2**32
  text = dpo_step.table([SEARCH, row("shared"), slow])
  assert "| TRL | 2.00 [2.00, 2.00] | 4.00 | 4.00 GiB | 25% |" in text
  assert "TRL (trl 1.2.3), pairs a second tried:" in text
  assert "micro-batches of 8, sdpa, padded: 3.00\n" in text
  assert "micro-batches of 4, sdpa, padded: 9.00, with another" in text
  assert "micro-batches of 16, sdpa, padded: refused: no memory" in text


def test_the_figure_shows_medians_by_model(tmp_path):
  other = row("shared") | {"model": "pythia-70m"}
  bars = dpo_step.bars([SEARCH, row("shared"), row("TRL"), other])
  assert bars == {
    "pythia-14m": {"shared": (8.0, 1.0), "TRL": (8.0, 1.0)},
    "pythia-70m": {"shared": (8.0, 1.0)},
  }
  path = dpo_step_figure.draw(bars, tmp_path / "step.png")
  assert path.read_bytes().startswith(b"\x89PNG")
  assert figures.fingerprint(bars).encode() in path.read_bytes()


@pytest.mark.parametrize(
  ("losses", "message"),
  [
    ((0.7, 0.6, 0.7, 0.5), "at step 0"),
    ((LN2, 0.6, 0.701, 0.5), "curves differ"),
  ],
)
def test_other_work_is_not_compared(losses, message):
  with pytest.raises(ValueError, match=message):
    dpo_step.table([row("shared"), row("TRL", losses=losses)])


def test_padded_rows_of_the_plain_step():
  tokens, wanted = dpo_step_jax.padded([([5, 6], [7], [8, 9])], 5)
  np.testing.assert_array_equal(tokens, [[5, 6, 7, 1, 1], [5, 6, 8, 9, 1]])
  np.testing.assert_array_equal(wanted, [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0]])

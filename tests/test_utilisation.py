"""MFU of a run's own metrics, against hand arithmetic on its pairs."""

import pytest
import running

from dpo_jax.core import hardware
from dpo_jax.data import dataset, tokenizer
from dpo_jax.io import metrics
from dpo_jax.training import train


@pytest.mark.parametrize("kept", [False, True])
def test_mfu_of_a_run_by_hand(kept, tmp_path, monkeypatch):
  """As if each of the eight devices did a million flops a second."""
  peak = 1e6
  chip = hardware.Chip(peak, peak, 2**30, 1e9, 1e9)
  monkeypatch.setitem(hardware.CHIPS, "cpu", chip)
  files = running.make_files(tmp_path)
  run = running.configs(files)(
    **{
      "data.max_train": 28,
      "precompute_reference": kept,
      "eval_every": 0,
      "checkpoint_every": 0,
      "export_adapters": False,
    }
  )
  train.run(run, tmp_path / "run")
  rows = metrics.read(tmp_path / "run" / metrics.FILE)
  rows = [row for row in rows if "loss" in row]
  # Seven updates of four pairs are an epoch of all 28.
  assert len(rows) == 7
  useful = sum(
    row["mfu"] * 8 * peak * run.batch_size / row["pairs_per_second"]
    for row in rows
  )
  words = tokenizer.load(run.tokenizer)
  table = dataset.prepare(run.data, "dpo", words).train.table
  shape = running.SHAPE
  layers, width, mlp = shape.layers, shape.width, shape.mlp_width
  kernels = layers * (4 * width**2 + 2 * width * mlp)
  adapters = layers * 2 * (4 * width + 2 * width + 2 * (width + mlp))
  wanted = 0
  assert len(table) == 28
  for pair in table.take(range(28)):
    prompt, chosen, rejected = map(
      len, (pair.prompt, pair.chosen, pair.rejected)
    )
    # The prompt is computed once; each response sees it and itself.
    tokens = prompt + chosen + rejected
    predicted = chosen + rejected
    seen = prompt * (prompt + 1) / 2 + prompt * predicted
    seen += sum(n * (n + 1) / 2 for n in (chosen, rejected))
    # Forward twice, of which the reference's without adapters; backward once:
    # inputs of frozen kernels, both sides of adapters and of attention.
    forward = 1 if kept else 2
    wanted += (forward + 1) * 2 * kernels * tokens
    wanted += 6 * adapters * tokens
    wanted += (forward + 2) * 4 * layers * width * seen
    wanted += (forward + 1) * 2 * width * shape.vocab_size * predicted
  assert useful == pytest.approx(wanted, rel=1e-4)

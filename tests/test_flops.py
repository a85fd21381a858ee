"""Model flops and MFU by hand, and the table of chips."""

import dataclasses

import jax
import jax.numpy as jnp
import operations
import pytest
import running
import tiny

from dpo_jax.core import hardware
from dpo_jax.data import dataset, tokenizer
from dpo_jax.io import metrics
from dpo_jax.model import flops, gpt_neox
from dpo_jax.training import train

# One layer of width 2, one head, MLP of 3, vocabulary of 5.
SMALL = gpt_neox.ModelConfig(5, 2, 1, 1, 3, 1.0, 10000.0, 1e-5, 8)
LORA = dataclasses.replace(
  SMALL, lora=gpt_neox.LoraConfig(1, 2.0, 0.0, ("dense", "dense_h_to_4h"))
)
# Three tokens that see 1, 2 and 3, of which two predict.
WORK = flops.Work(tokens=3, completion_tokens=2, visible=6)


def test_a_forward_pass_by_hand():
  # q, k, v 2x6, out 2x2, up 2x3, down 3x2: 28 multiplications a token.
  # Scores and their sums of values: 2 each for a pair. Unembedding: 10.
  wanted = 2 * (28 * 3 + (2 + 2) * 6 + 10 * 2)
  assert flops.forward(SMALL, WORK, adapters=False) == wanted == 256
  assert flops.forward(LORA, WORK, adapters=False) == wanted
  # dense 2 to 1 to 2, up 2 to 1 to 3: 9 more a token.
  assert flops.forward(LORA, WORK, adapters=True) == wanted + 2 * 9 * 3


def test_a_step_by_hand():
  forward = 256
  # All weights: every product has two in the backward pass.
  assert flops.step(SMALL, WORK, reference=False) == 3 * forward
  assert flops.step(SMALL, WORK, reference=True) == 4 * forward
  # Adapters: frozen kernels and the unembedding have one, attention two.
  frozen, attention, adapters = 2 * (28 * 3 + 10 * 2), 2 * 4 * 6, 2 * 9 * 3
  wanted = 2 * frozen + 3 * attention + 3 * adapters
  assert flops.step(LORA, WORK, reference=False) == wanted
  assert flops.step(LORA, WORK, reference=True) == wanted + forward


def test_products_of_a_traced_forward_pass():
  """Every product of `gpt_neox.apply` is counted, and nothing else."""
  config = dataclasses.replace(
    tiny.CONFIG, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
  )
  rows, size = 3, 8

  def run(base, lora, tokens):
    place = jnp.broadcast_to(jnp.arange(size), (rows, size))
    mask = jnp.ones((rows, size, size), bool)
    hidden, _ = gpt_neox.apply(config, base, lora, tokens, place, mask)
    return gpt_neox.unembed(base, hidden)

  base, lora = tiny.weights(config), tiny.adapters(config)
  traced = jax.make_jaxpr(run)(base, lora, jnp.zeros((rows, size), int))
  # Nothing is masked: every query sees all keys of its row.
  work = flops.Work(rows * size, rows * size, rows * size * size)
  found = operations.flops(traced.jaxpr)
  assert found == flops.forward(config, work, adapters=True)


def test_devices():
  chip = hardware.chip("TPU v5 lite")
  assert chip.bf16_flops == 197e12
  assert hardware.chip("NVIDIA H200").bf16_flops == 989.4e12
  assert hardware.chip("cpu") is None
  # A page's number is in the right unit if a pod's peak comes out: 256 chips.
  assert 256 * hardware.chip("TPU v6 lite").bf16_flops == pytest.approx(
    234.9e15, rel=1e-3
  )
  for chip in hardware.CHIPS.values():
    assert 14 < chip.hbm_bytes / 2**30 < 142
    assert 1e14 < chip.bf16_flops < 1e15
    assert 6 <= chip.bf16_flops / chip.float32_flops <= 16
    assert 8e11 < chip.hbm_bandwidth < 5e12
    assert 2e11 <= chip.link_bandwidth < 1e12


def test_mfu():
  chip = hardware.chip("TPU v5 lite")
  # Two chips do half of a second's peak in two seconds.
  assert hardware.mfu(197e12, 2.0, 2, chip) == 0.25
  assert hardware.mfu(197e12, 2.0, 2, None) is None


@pytest.mark.parametrize("kept", [False, True])
def test_mfu_of_a_run_by_hand(kept, tmp_path, monkeypatch):
  """As if each of the eight devices did a million flops a second."""
  peak = 1e6
  chip = hardware.Chip(peak, peak, 2**30, 1e9, 1e9)
  monkeypatch.setitem(hardware.CHIPS, "cpu", chip)
  files = running.make_files(tmp_path)
  run = running.configs(files)(
    **{
      "data.max_train": 8,
      "precompute_reference": kept,
      "eval_every": 0,
      "checkpoint_every": 0,
      "export_adapters": False,
    }
  )
  train.run(run, tmp_path / "run")
  rows = metrics.read(tmp_path / "run" / metrics.FILE)
  rows = [row for row in rows if "loss" in row]
  # Two updates of four pairs are an epoch of all eight.
  assert len(rows) == 2
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
  assert len(table) == 8
  for pair in table.take(range(8)):
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

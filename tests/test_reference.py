"""Precomputed log-probs of the reference: right, reusable, never stale."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from dpo_jax.core import sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, token_table
from dpo_jax.io import safetensors
from dpo_jax.model import gpt_neox
from dpo_jax.training import optimizer, reference
from dpo_jax.training import step as step_lib

LORA = dataclasses.replace(
  tiny.CONFIG, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
)
HOW = packing.Packing("shared", 40, 1, 1, False, 1)
OF = {"data": "d" * 16, "model": "m" * 16, "dtype": "float32 of float32"}


@pytest.fixture(scope="module")
def pairs():
  """Pairs whose tokens do not lie in the items' order, some of them twice."""
  table = token_table.from_items(tiny.pairs(11, 3))
  return table.take([7, 0, 1, 9, 2, 7, 10, 4, 5])


@pytest.fixture(scope="module")
def base():
  return tiny.weights(tiny.CONFIG)


def compute(base, table, how=HOW, mesh=None, batch_size=4):
  mesh = mesh or sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  return reference.token_logps(
    tiny.CONFIG, base, None, table, how, batch_size, mesh
  )


@pytest.fixture(scope="module")
def logps(base, pairs):
  return compute(base, pairs)


def test_layout_mesh_and_batch_change_nothing(base, pairs, logps):
  mesh = sharding.make_mesh(4, 2, 1)
  how = dataclasses.replace(HOW, layout="packed", shards=8)
  sharded = jax.device_put(base, sharding.shardings(base, mesh))
  found = compute(sharded, pairs, how, mesh, batch_size=3)
  np.testing.assert_allclose(found, logps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_lora", [True, False])
def test_a_step_gives_the_same_with_them(base, pairs, logps, with_lora):
  config = LORA if with_lora else tiny.CONFIG
  objective = step_lib.Objective("dpo", tiny.loss(beta=0.5), 4)
  tx = optimizer.make(
    optimizer.OptimizerSettings(
      "adamw", 0.01, "constant", 0, 0.0, 0.0, 0.9, 0.99, 1e-8, 1.0
    ),
    9,
    step_lib.trainable(config),
  )
  adapters = tiny.adapters(LORA) if with_lora else {}
  # Somewhere else than the reference, in full fine-tuning too.
  policy = base if with_lora else tiny.weights(tiny.CONFIG, 5)
  state = step_lib.init_state(policy, adapters, tx)
  step = jax.jit(step_lib.make_train_step(config, objective, tx, 0))
  taken = pairs.take([3, 5, 0, 8, 1, 1, 6, 2])
  how = dataclasses.replace(HOW, microbatches=2)
  spread = reference.spread(pairs, logps)
  computed, _ = batch_lib.pack(taken, how)
  kept, _ = batch_lib.pack(taken, how, spread)
  other = None if with_lora else base
  wanted_state, wanted = step(state, other, computed)
  # Without any reference: what is kept is all that is needed.
  found_state, found = step(state, None, kept)
  assert found.keys() == wanted.keys()
  assert abs(float(wanted["loss"]) - np.log(2)) > 1e-2
  for name, value in wanted.items():
    assert float(found[name]) == pytest.approx(float(value), abs=1e-5), name
  found, wanted = (
    jax.tree_util.tree_leaves_with_path(s.params[step_lib.trainable(config)])
    for s in (found_state, wanted_state)
  )
  for (path, a), (_, b) in zip(found, wanted, strict=True):
    if sharding.path_name(path).endswith("query_key_value/bias"):
      # A key's bias has no gradient but rounding, which Adam makes a step.
      continue
    # A step is 0.01; Adam magnifies the rounding of small gradients.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(OF))
def test_those_of_something_else_are_refused(tmp_path, pairs, logps, name):
  path = tmp_path / "train.safetensors"
  reference.save(path, logps, OF)
  with pytest.raises(
    ValueError, match=f"made with {name}=.*it is now other; delete train.safe"
  ):
    reference.load(path, pairs, OF | {name: "other"})


def test_damage_is_found(tmp_path, pairs, logps):
  path = tmp_path / "train.safetensors"
  reference.save(path, logps, OF)
  np.testing.assert_array_equal(reference.load(path, pairs, OF), logps)
  whole = path.read_bytes()
  for at in (len(whole) - 1, len(whole) - 4 * len(logps)):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="is damaged; delete"):
      reference.load(path, pairs, OF)
  path.write_bytes(whole[:-3])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    reference.load(path, pairs, OF)
  # Of fewer items than there are.
  reference.save(path, logps[:-1], OF)
  with pytest.raises(ValueError, match="is damaged; delete"):
    reference.load(path, pairs, OF)


def test_log_probs_that_are_not_finite_are_not_kept(tmp_path, logps):
  path = tmp_path / "train.safetensors"
  bad = logps.copy()
  bad[3] = np.nan
  with pytest.raises(ValueError, match="NaN"):
    reference.save(path, bad, OF)
  assert not list(tmp_path.iterdir())


def two():
  """Five prompt tokens and six of responses, and their log-probs."""
  table = token_table.from_items(
    [
      token_table.Pair("a", (5, 6), (7,), (8, 9)),
      token_table.Pair("b", (3, 3, 3), (4,), (2, 1)),
    ]
  )
  return table, -np.arange(1, 7, dtype=np.float32)


def test_spread_by_hand():
  table, values = two()
  wanted = [0, 0, -1, -2, -3, 0, 0, 0, -4, -5, -6]
  assert reference.spread(table, values).tolist() == wanted
  # In the items' order, wherever their tokens lie.
  wanted = [0, 0, -4, -5, -6, 0, 0, 0, -1, -2, -3]
  assert reference.spread(table.take([1, 0]), values).tolist() == wanted


def test_a_file_of_another_kind_is_refused(tmp_path):
  table, values = two()
  path = tmp_path / "train.safetensors"
  sha256 = {"sha256": reference._hash(values)}
  for metadata in (sha256, sha256 | {"kind": "other"}):
    safetensors.write(path, {"logps": values}, [values], metadata)
    with pytest.raises(ValueError, match="holds no reference log-probs"):
      reference.load(path, table, {})
  # Of the right kind, but without its hash.
  safetensors.write(
    path, {"logps": values}, [values], {"kind": reference._FORMAT}
  )
  with pytest.raises(ValueError, match="is damaged"):
    reference.load(path, table, {})


def test_in_bfloat16_they_are_those_of_the_step():
  config = dataclasses.replace(
    tiny.CONFIG, dtype="bfloat16", heads=4, mlp_width=64, vocab_size=512
  )
  lora = dataclasses.replace(
    config, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
  )
  table = token_table.from_items(tiny.pairs(4, 0, (32, 64), (32, 64), config))
  how = packing.Packing("shared", 256, 1, 1, False, 1)
  base = tiny.weights(config)
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  # The very batch of the step.
  logps = reference.token_logps(config, base, None, table, how, 4, mesh)
  kept = reference.spread(table, logps)
  batch, _ = batch_lib.pack(table, how, kept)
  loss = tiny.loss(beta=5.0)
  evaluate = jax.jit(
    step_lib.make_eval_step(lora, step_lib.Objective("dpo", loss, 4)),
    compiler_options=step_lib.COMPILER_OPTIONS,
  )
  adapters = gpt_neox.init_lora(lora, jax.random.key(1))
  found = evaluate({"base": base, "lora": adapters}, None, batch)
  assert float(found["loss"]) / 4 == pytest.approx(np.log(2), abs=1e-6)

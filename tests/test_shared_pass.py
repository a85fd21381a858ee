"""Policy and reference in one pass of the base, against a pass for each."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
import tiny

from dpo_jax.core import sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing
from dpo_jax.model import gpt_neox, quantization
from dpo_jax.training import step

CONFIG = dataclasses.replace(
  tiny.CONFIG,
  layers=3,
  logit_chunk=16,
  lora=gpt_neox.LoraConfig(2, 4.0, 0.5, gpt_neox.TARGETS),
)
PAIRS = 8


def two_passes(config, base, lora, batch, dropout_key=None):
  """The slow twin of `step.both_token_stats`."""
  policy = step.token_stats(config, base, lora, batch, dropout_key)
  reference = step.token_stats(config, base, None, batch)
  return policy, jax.lax.stop_gradient(reference)


def batch_of(microbatches=1, rows=8):
  how = packing.Packing("shared", 40, rows, microbatches, False, 1)
  return batch_lib.pack(tiny.pairs(PAIRS, 3), how)[0]


def both(function, config, base, lora, batch):
  """Statistics of both, and the gradient of a number that all of them enter."""
  micro = jax.tree.map(lambda x: x[0], batch)
  weights = jax.random.normal(jax.random.key(6), micro.target.shape)

  def number(lora):
    stats = function(config, base, lora, micro, jax.random.key(5))
    found = [part for one in stats for part in (one.logps, one.entropy)]
    return sum(jnp.sum(weights * part) for part in found), stats

  return jax.grad(number, has_aux=True)(lora)


@functools.cache
def compiled(function, mesh=None, **changes):
  """The program of `both`, for weights of float32."""
  config = dataclasses.replace(CONFIG, **changes)
  mesh = mesh or alone()
  with jax.set_mesh(mesh):
    run = jax.jit(
      functools.partial(both, function, config),
      compiler_options=step.COMPILER_OPTIONS,
    )
    return run.lower(*laid(mesh)).compile()


def laid(mesh):
  """Base, adapters and batch."""
  weights = (tiny.weights(CONFIG), tiny.adapters(CONFIG))
  return *(
    jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in weights
  ), sharding.put(batch_of(), mesh, leading=1)


@functools.cache
def wanted():
  return jax.device_get(compiled(two_passes)(*laid(alone())))


def alone():
  return sharding.make_mesh(devices=jax.devices()[:1])


def assert_same(found, wanted, tolerance=1e-6):
  """Arrays equal, each to a share of its greatest number."""
  found, wanted = (
    jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    for tree in (found, wanted)
  )
  for (path, a), (_, b) in zip(found, wanted, strict=True):
    scale = max(np.abs(b).max(), 1)
    np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * scale, err_msg=str(path)
    )


# "full" is what the mesh of the last test runs with.
@pytest.mark.parametrize("remat", ["none", "save_projections"])
def test_one_pass_gives_what_two_give(remat):
  found = compiled(step.both_token_stats, remat=remat)(*laid(alone()))
  # Sums of float32 in another order at most.
  assert_same(found, wanted())
  grads, (policy, reference) = wanted()
  assert np.abs(policy.logps - reference.logps).max() > 0.1
  assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(grads))


def test_one_pass_of_a_base_in_eight_bits():
  base, lora, batch = laid(alone())
  base = quantization.base(base)
  function = functools.partial(both, step.both_token_stats, CONFIG)
  found = jax.jit(function)(base, lora, batch)
  # The same pass over the same numbers in full. What two passes round otherwise
  # is the test above's.
  full = quantization.restore(base, jnp.float32)
  full = jax.tree.map(lambda x: x.astype(jnp.float32), full)
  assert_same(found, compiled(step.both_token_stats)(full, lora, batch))


def test_while_adapters_are_zero_both_are_equal():
  base, lora, batch = laid(alone())
  lora = jax.tree.map_with_path(
    lambda path, x: x * ("lora_a" in sharding.path_name(path)), lora
  )
  for changes in ({"remat": "full"}, {"dtype": "bfloat16", "remat": "full"}):
    program = compiled(step.both_token_stats, **changes)
    _, (policy, reference) = program(base, lora, batch)
    gap = jnp.abs(policy.logps - reference.logps)
    # The last bits of numbers up to sixteen in float32, in which logits and
    # their softmax are; a bit of bfloat16 would be a hundredth.
    assert float(gap.max()) < 4e-6
    assert float(jnp.abs(policy.logps).max()) > 1


def test_no_gradient_is_formed_of_the_reference():
  config = dataclasses.replace(CONFIG, remat="none")
  flops, held = [], []
  for function in (step.both_token_stats, two_passes):
    with jax.set_mesh(alone()):
      traced = jax.make_jaxpr(functools.partial(both, function, config))(
        *laid(alone())
      )
    flops.append(operations.flops(traced.jaxpr))
    program = compiled(function, remat="none")
    held.append(program.memory_analysis().temp_size_in_bytes)
  assert flops[0] == flops[1]
  # Nor is anything kept for one: a pass keeps more than a tenth of this.
  assert held[0] < 1.1 * held[1]


def test_layers_are_gathered_once_for_both():
  mesh = sharding.make_mesh(2, 2, 2)
  one = compiled(step.both_token_stats, mesh, remat="full")
  assert_same(one(*laid(mesh)), wanted(), 1e-5)
  in_half = compiled(
    step.both_token_stats, mesh, remat="full", dtype="bfloat16"
  )
  for program in (one, in_half):
    gathered = collections.Counter(
      each.shape
      for each in operations.collectives(program.as_text())
      if each.kind == "all-gather" and each.looped
    )
    # In the loop of layers forward for both, and in that backward for the
    # policy. Heads, and the MLP, are halved by the tensor axis.
    assert gathered[16, 1, 3, 8] == gathered[1, 8, 16] == 2
    # Both kernels of the MLP.
    assert gathered[16, 16] == 4

"""Meshes, the sharding rules, and training steps under them."""

import dataclasses
import functools
import math
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import operations
import optax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

from dpo_jax.core import sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing
from dpo_jax.model import gpt_neox
from dpo_jax.training import optimizer
from dpo_jax.training import step as step_lib

# Five layers: an array of all of them is recognized by its size.
FULL = dataclasses.replace(tiny.CONFIG, layers=5)
LORA = dataclasses.replace(
  FULL, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
)
PAIRS = 8


@pytest.mark.parametrize(
  ("asked", "devices", "got"),
  [
    # All devices and no split of the weights by default.
    ((), None, (8, 1, 1)),
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((2, 2, 2), 8, (2, 2, 2)),
    ((2, -1, 2), 8, (2, 2, 2)),
    ((1, 1, -1), 4, (1, 1, 4)),
    ((-1, 1, 1), 1, (1, 1, 1)),
  ],
)
def test_meshes(asked, devices, got):
  mesh = sharding.make_mesh(*asked, devices=jax.devices()[:devices])
  assert tuple(mesh.shape.values()) == got
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert sharding.data_shards(mesh) == got[0] * got[1]


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    *((x, "devices, but there are 8") for x in ((3, 1, 1), (-1, 3, 1))),
    *((x, "devices, but there are 8") for x in ((-1, 16, 1), (1, 1, 1))),
    *((x, "at most one -1") for x in ((0, 1, 1), (-2, 1, 1), (-1, -1, 1))),
  ],
)
def test_sizes_that_make_no_mesh_are_refused(sizes, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(*sizes)


# By hand: vocabulary, heads and MLP over tensor, width over fsdp.
BASE = {
  "embed/kernel": P("tensor", "fsdp"),
  "unembed/kernel": P("fsdp", "tensor"),
  "final_norm/scale": P(None),
  "final_norm/bias": P(None),
  "blocks/attention_norm/scale": P(None, None),
  "blocks/attention_norm/bias": P(None, None),
  "blocks/mlp_norm/scale": P(None, None),
  "blocks/mlp_norm/bias": P(None, None),
  "blocks/query_key_value/kernel": P(None, "fsdp", "tensor", None, None),
  "blocks/query_key_value/bias": P(None, "tensor", None, None),
  "blocks/dense/kernel": P(None, "tensor", None, "fsdp"),
  "blocks/dense/bias": P(None, None),
  "blocks/dense_h_to_4h/kernel": P(None, "fsdp", "tensor"),
  "blocks/dense_h_to_4h/bias": P(None, "tensor"),
  "blocks/dense_4h_to_h/kernel": P(None, "tensor", "fsdp"),
  "blocks/dense_4h_to_h/bias": P(None, None),
}


def shapes():
  key = jax.random.key(0)
  return {
    "base": jax.eval_shape(lambda: gpt_neox.init(LORA, key)),
    "lora": jax.eval_shape(lambda: gpt_neox.init_lora(LORA, key)),
  }


def by_path(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {sharding.path_name(path): leaf for path, leaf in flat}


def test_the_table_names_every_weight():
  mesh = sharding.make_mesh(2, 2, 2)
  found = by_path(sharding.shardings(shapes()["base"], mesh))
  assert {name: leaf.spec for name, leaf in found.items()} == BASE
  for leaf in by_path(sharding.shardings(shapes()["lora"], mesh)).values():
    assert leaf.is_fully_replicated


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize("trainable", ["base", "lora"])
def test_moments_are_sharded_as_their_weights(trainable, rule):
  settings = optimizer.OptimizerSettings(
    rule, 1.0, "cosine", 2, 0.0, 0.1, 0.9, 0.99, 1e-8, 1.0
  )
  tx = optimizer.make(settings, 4, trainable)
  state = jax.eval_shape(tx.init, shapes())
  mesh = sharding.make_mesh(2, 2, 2)
  found = by_path(sharding.shardings(state, mesh))
  weights = by_path(sharding.shardings(shapes()[trainable], mesh))
  moments = []
  for name, leaf in by_path(state).items():
    weight = name.rpartition(f"{trainable}/")[2]
    if weight in weights:
      moments.append(weight)
      assert found[name] == weights[weight]
    else:
      # Counters, and Muon's three coefficients.
      assert leaf.size <= 3
      assert found[name].is_fully_replicated
  # Muon has one for each layer's matrices.
  matrices = [w for w in weights if re.search("blocks/.*(kernel|lora_.)$", w)]
  one = matrices if rule == "muon" else []
  assert sorted([*moments, *one]) == sorted([*weights] * 2)


def test_factored_moments_are_replicated():
  wide = dataclasses.replace(tiny.CONFIG, width=256, mlp_width=512, layers=4)
  base = jax.eval_shape(lambda: gpt_neox.init(wide, jax.random.key(0)))
  settings = optimizer.OptimizerSettings(
    "adafactor", 1.0, "constant", 0, 0.0, 0.0, 0.9, 0.99, 1e-8, 1.0
  )
  tx = optimizer.make(settings, 4, "base")
  state = jax.eval_shape(tx.init, {"base": base, "lora": {}})
  found = by_path(sharding.shardings(state, sharding.make_mesh(2, 2, 2)))
  rows = [x for name, x in found.items() if "/v_row/" in name]
  assert rows
  assert all(x.is_fully_replicated for x in rows)
  # Those of a vector are sharded as it is.
  (bias,) = (
    x
    for name, x in found.items()
    if name.endswith("/v/base/blocks/dense_h_to_4h/bias")
  )
  assert bias.spec == P(None, "tensor")


def test_an_axis_that_does_not_divide_is_refused():
  base = shapes()["base"]
  sharding.shardings(base, sharding.make_mesh(1, 8, 1))
  # Two heads on eight devices.
  with pytest.raises(
    ValueError, match=r"blocks/dense/kernel .*: 2 is not a multiple .*'tensor'"
  ):
    sharding.shardings(base, sharding.make_mesh(1, 1, 8))


def test_batches_are_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(2, 2, 2)
  rows = sharding.put(np.arange(2 * 8 * 3).reshape(2, 8, 3), mesh, leading=1)
  starts = [shard.index[1].start for shard in rows.addressable_shards]
  # Both devices of the tensor axis hold the same two rows.
  assert sorted(starts) == [0, 0, 2, 2, 4, 4, 6, 6]
  assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2, 3)}
  assert sharding.replicated(mesh).is_fully_replicated


def test_constrain_is_nothing_without_a_mesh():
  x = jnp.ones((2, 3))
  assert sharding.constrain(x, "batch", None) is x


# --- steps


def shuffled_mesh():
  """All three axes, over devices that are out of order."""
  devices = [jax.devices()[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
  return sharding.make_mesh(2, 2, 2, devices=devices)


def keep_gradients():
  """An optimizer whose state is the last gradient and whose update is zero."""

  def update(grads, state, params):
    del state, params
    return jax.tree.map(jnp.zeros_like, grads), grads

  init = functools.partial(jax.tree.map, jnp.zeros_like)
  return optax.GradientTransformation(init, update)


def step_of(config, mesh=None):
  """The jitted step of `config` and its arguments, on the mesh."""
  name = step_lib.trainable(config)
  tx = optax.partition(
    {"train": keep_gradients(), "freeze": optax.set_to_zero()},
    dict.fromkeys(("base", "lora"), "freeze") | {name: "train"},
  )
  objective = step_lib.Objective("dpo", tiny.loss(beta=0.5), PAIRS // 2)
  step = step_lib.make_train_step(config, objective, tx, 0)
  how = packing.Packing("shared", 40, 8, 2, False, 1)
  batch, _ = batch_lib.pack(tiny.pairs(PAIRS, 3), how)
  base, reference = tiny.weights(config), None
  adapters = tiny.adapters(config) if config.lora else {}
  if config.lora is None:
    reference = tiny.weights(config, 7)
  state = step_lib.init_state(base, adapters, tx)
  if mesh is None:
    return jax.jit(step), (state, reference, batch)
  placed = sharding.shardings(jax.eval_shape(lambda: state), mesh)
  state = jax.device_put(state, placed)
  if reference is not None:
    reference = jax.device_put(reference, sharding.shardings(reference, mesh))
  batch = sharding.put(batch, mesh, leading=1)
  out = (placed, sharding.replicated(mesh))
  return jax.jit(step, out_shardings=out), (state, reference, batch)


@functools.cache
def compiled(config, split):
  """Compiled step, the partitioner's log if it is split, and its arguments."""
  if not split:
    step, arguments = step_of(config)
    return step.lower(*arguments).compile(), "", arguments
  mesh = shuffled_mesh()
  with jax.set_mesh(mesh):
    step, arguments = step_of(config, mesh)
    return *compile_logged(step, *arguments), arguments


def compile_logged(step, *arguments):
  """Compiles without the cache, whose programs log nothing."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  # JAX reads the setting once a process, unless the cache is reset.
  compilation_cache.reset_cache()
  stderr = os.dup(2)
  with tempfile.TemporaryFile("w+") as file:
    os.dup2(file.fileno(), 2)
    try:
      executable = step.lower(*arguments).compile()
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
      jax.config.update("jax_enable_compilation_cache", before)
      compilation_cache.reset_cache()
    file.seek(0)
    return executable, file.read()


def gradients(config, split):
  """Metrics, and gradients by path."""
  step, _, arguments = compiled(config, split)
  state, metrics = step(*arguments)
  grads = {k: np.asarray(v) for k, v in by_path(state.opt_state).items()}
  return jax.device_get(metrics), grads


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
def test_losses_and_gradients_are_those_of_one_device(config):
  metrics, grads = gradients(config, split=True)
  wanted_metrics, wanted = gradients(config, split=False)
  for key, value in wanted_metrics.items():
    # Sums of float32 in another order.
    assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
  assert grads.keys() == wanted.keys()
  seen = 0
  for path, value in wanted.items():
    size = np.abs(value).max()
    np.testing.assert_allclose(
      grads[path], value, rtol=0, atol=1e-5 * max(size, 1), err_msg=path
    )
    seen += size > 1e-3
  assert seen >= len(wanted) - 1


WARNING = "Involuntary full rematerialization"


def test_the_warning_can_be_seen():
  """From one split to another that shares no axis with it."""

  def f(x):
    for axes in ((("data", "fsdp"), None, None), (None, "fsdp", "data")):
      x = jnp.sin(jax.lax.with_sharding_constraint(x, P(*axes)))
    return x

  with jax.set_mesh(shuffled_mesh()):
    assert WARNING in compile_logged(jax.jit(f), jnp.ones((8, 8, 8)))[1]


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
def test_weights_are_gathered_a_layer_at_a_time(config):
  step, logged, _ = compiled(config, split=True)
  assert WARNING not in logged, logged
  kernels = [
    math.prod(part["kernel"].shape)
    for part in shapes()["base"]["blocks"].values()
    if "kernel" in part
  ]
  gathered = {
    math.prod(one.shape)
    for one in operations.collectives(step.as_text())
    if one.kind == "all-gather"
  }
  # Of the kernel's half on each device of the tensor axis.
  assert {size // config.layers // 2 for size in kernels} <= gathered
  # All layers together never are.
  assert not {size // 2 for size in kernels} & gathered

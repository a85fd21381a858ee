"""Steps on meshes: the numbers of one device, and no weights moved in vain."""

import dataclasses
import functools
import math

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
from dpo_jax.training import losses
from dpo_jax.training import step as step_lib

# Five layers: an array of all of them is told apart by its size.
FULL = dataclasses.replace(tiny.CONFIG, layers=5)
LORA = dataclasses.replace(
  FULL, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
)
PAIRS = 8
# The mesh's sizes, and an order of the devices.
MESHES = {
  "data": ((8, 1, 1), range(8)),
  "fsdp": ((1, 8, 1), range(8)),
  "all": ((2, 2, 2), range(8)),
  "shuffled": ((2, 2, 2), (5, 2, 7, 0, 3, 6, 1, 4)),
}


def mesh_of(name):
  sizes, order = MESHES[name]
  devices = jax.devices()
  return sharding.make_mesh(*sizes, devices=[devices[i] for i in order])


def keep_gradients():
  """An optimizer whose state is the last gradient, and whose update is none."""

  def update(grads, state, params):
    del state, params
    return jax.tree.map(jnp.zeros_like, grads), grads

  init = functools.partial(jax.tree.map, jnp.zeros_like)
  return optax.GradientTransformation(init, update)


def step_of(config, mesh=None, microbatches=2):
  """The jitted step of `config`, and its arguments, laid on the mesh."""
  name = step_lib.trainable(config)
  tx = optax.partition(
    {"train": keep_gradients(), "freeze": optax.set_to_zero()},
    dict.fromkeys(("base", "lora"), "freeze") | {name: "train"},
  )
  objective = step_lib.Objective(
    "dpo", losses.LossSettings("sigmoid", 0.5, 0.0), PAIRS // microbatches
  )
  step = step_lib.make_train_step(config, objective, tx, 0)
  how = packing.Packing("shared", 40, 8, microbatches, False, 1)
  batch, _ = batch_lib.pack(tiny.pairs(PAIRS, 3), how)
  base, reference = tiny.weights(config), None
  adapters = tiny.adapters(config) if config.lora else {}
  if config.lora is None:
    reference = tiny.weights(config, 7)
  state = step_lib.init_state(base, adapters, tx)
  if mesh is None:
    return jax.jit(step), (state, reference, batch)
  lying = sharding.shardings(jax.eval_shape(lambda: state), mesh)
  state = jax.device_put(state, lying)
  if reference is not None:
    reference = jax.device_put(reference, sharding.shardings(reference, mesh))
  batch = sharding.put(batch, mesh, leading=1)
  out = (lying, sharding.replicated(mesh))
  return jax.jit(step, out_shardings=out), (state, reference, batch)


def gradients(config, mesh=None):
  """Metrics, and gradients by path."""
  step, arguments = step_of(config, mesh)
  state, metrics = step(*arguments)
  found = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
  return jax.device_get(metrics), {
    sharding.path_name(path): np.asarray(leaf) for path, leaf in found
  }


@functools.cache
def alone(config):
  return gradients(config)


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", MESHES)
def test_losses_and_gradients_are_those_of_one_device(name, config):
  mesh = mesh_of(name)
  with jax.set_mesh(mesh):
    metrics, grads = gradients(config, mesh)
  wanted_metrics, wanted = alone(config)
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


def compiled_text(name, config, capfd):
  """A step's text, and what the partitioner logged while compiling it."""
  mesh = mesh_of(name)
  with jax.set_mesh(mesh):
    step, arguments = step_of(config, mesh)
    capfd.readouterr()
    return fresh(step, *arguments), capfd.readouterr().err


def fresh(step, *arguments):
  """Compiles anew: a program from the cache logs nothing."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  # JAX looks at the setting once a process, unless the cache is reset.
  compilation_cache.reset_cache()
  try:
    return step.lower(*arguments).compile().as_text()
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


WARNING = "Involuntary full rematerialization"


def test_the_warning_can_be_seen(capfd):
  """From one split to another that shares no way with it."""
  mesh = mesh_of("all")

  def f(x):
    for axes in ((("data", "fsdp"), None, None), (None, "fsdp", "data")):
      x = jnp.sin(jax.lax.with_sharding_constraint(x, P(*axes)))
    return x

  with jax.set_mesh(mesh):
    fresh(jax.jit(f), jnp.ones((8, 8, 8)))
  assert WARNING in capfd.readouterr().err


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_weights_are_gathered_a_layer_at_a_time(name, config, capfd):
  text, logged = compiled_text(name, config, capfd)
  assert WARNING not in logged, logged
  kernels = [
    math.prod(part["kernel"].shape)
    for part in tiny.weights(config)["blocks"].values()
    if "kernel" in part
  ]
  gathered = {
    math.prod(one.shape)
    for one in operations.collectives(text)
    if one.kind == "all-gather"
  }
  tensor = mesh_of(name).shape["tensor"]
  layers = {size // config.layers // tensor for size in kernels}
  # Each kernel's layer is gathered; the stack of all layers never is.
  assert layers <= gathered
  assert not {size // tensor for size in kernels} & gathered

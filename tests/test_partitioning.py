"""Meshes, and where every weight lies on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from dpo_jax.core import sharding
from dpo_jax.model import gpt_neox
from dpo_jax.training import optimizer


@pytest.mark.parametrize(
  ("asked", "devices", "got"),
  [
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((2, 2, 2), 8, (2, 2, 2)),
    ((-1, 2, 2), 8, (2, 2, 2)),
    ((2, -1, 2), 8, (2, 2, 2)),
    ((1, 1, -1), 4, (1, 1, 4)),
    ((-1, 1, 1), 1, (1, 1, 1)),
    ((1, 1, 1), 1, (1, 1, 1)),
  ],
)
def test_meshes(asked, devices, got):
  mesh = sharding.make_mesh(*asked, devices=jax.devices()[:devices])
  assert tuple(mesh.shape.values()) == got
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.size == devices
  assert sharding.data_shards(mesh) == got[0] * got[1]


def test_a_mesh_takes_all_devices_by_default():
  assert sharding.make_mesh().size == jax.device_count() == 8


@pytest.mark.parametrize(
  "sizes",
  [(3, 1, 1), (4, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1), (1, 1, 1)],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
  with pytest.raises(ValueError, match="devices, but there are 8"):
    sharding.make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-2, 1, 1), (-1, -1, 1)])
def test_sizes_that_make_no_sense_are_refused(sizes):
  with pytest.raises(ValueError, match="must be positive, with at most one -1"):
    sharding.make_mesh(*sizes)


# Every weight, by hand: vocabulary, heads and mlp over tensor, width over fsdp.
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
CONFIG = dataclasses.replace(
  tiny.CONFIG, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
)


def shapes(config=CONFIG):
  key = jax.random.key(0)
  return {
    "base": jax.eval_shape(lambda: gpt_neox.init(config, key)),
    "lora": jax.eval_shape(lambda: gpt_neox.init_lora(config, key)),
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


@pytest.mark.parametrize("trainable", ["base", "lora"])
def test_moments_lie_like_their_weights(trainable):
  settings = optimizer.OptimizerSettings(
    "adamw", 1.0, "cosine", 2, 0.1, 0.9, 0.99, 1e-8, 1.0
  )
  tx = optimizer.make(settings, 4, trainable)
  state = jax.eval_shape(tx.init, shapes())
  mesh = sharding.make_mesh(2, 2, 2)
  placed = by_path(sharding.shardings(state, mesh))
  weights = by_path(sharding.shardings(shapes()[trainable], mesh))
  seen = 0
  for name, leaf in by_path(state).items():
    sequence_ids = next(
      (w for w in weights if name.endswith(f"{trainable}/{w}")), None
    )
    if sequence_ids is None:
      assert leaf.shape == ()
      assert placed[name].is_fully_replicated
    else:
      assert placed[name] == weights[sequence_ids]
      seen += 1
  assert seen == 2 * len(weights)


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
  rows = jax.device_put(
    np.arange(2 * 8 * 3).reshape(2, 8, 3),
    sharding.batch_sharding(mesh, leading=1),
  )
  starts = [shard.index[1].start for shard in rows.addressable_shards]
  # Both devices of the tensor axis hold the same two rows.
  assert sorted(starts) == [0, 0, 2, 2, 4, 4, 6, 6]
  assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2, 3)}
  assert sharding.replicated(mesh).is_fully_replicated


def test_constrain_is_nothing_without_a_mesh():
  x = jnp.ones((2, 3))
  assert sharding.constrain(x, "batch", None) is x


def test_path_names():
  tree = {"a": [optax.EmptyState(), optax.ScaleByScheduleState(jnp.ones(()))]}
  assert list(by_path(tree)) == ["a/1/count"]

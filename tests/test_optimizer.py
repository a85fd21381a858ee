"""Optimizers and schedules against torch's own; frozen weights stay put."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dpo_jax.training import optimizer as optimizer_lib

ADAMW = optimizer_lib.OptimizerSettings(
  name="adamw",
  learning_rate=0.02,
  schedule="constant",
  warmup_steps=3,
  weight_decay=0.3,
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  clip_norm=1.5,
)
RMSPROP = dataclasses.replace(ADAMW, name="rmsprop", weight_decay=0.0)
STEPS = 6
# Paths as in a model: kernels are decayed, biases and norms are not.
SHAPES = {
  "blocks": {
    "dense": {"kernel": (2, 3, 4), "bias": (2, 4)},
    "mlp_norm": {"scale": (2, 4), "bias": (2, 4)},
  },
  "embed": {"kernel": (5, 3)},
}
SPARED = ("scale", "bias")


def random_tree(rng, scale=1.0):
  return jax.tree.map(
    lambda shape: (scale * rng.normal(size=shape)).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def torch_weights(tree, settings):
  """The tree's leaves as parameters, and torch's own optimizer of them."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  parameters = [torch.nn.Parameter(torch.tensor(leaf)) for _, leaf in leaves]
  if settings.name == "rmsprop":
    return parameters, torch.optim.RMSprop(
      parameters, lr=settings.learning_rate, alpha=settings.b2, eps=1e-8
    )
  spared = [path[-1].key in SPARED for path, _ in leaves]
  return parameters, torch.optim.AdamW(
    [
      {
        "params": [p for p, s in zip(parameters, spared) if s == skip],
        "weight_decay": 0.0 if skip else settings.weight_decay,
      }
      for skip in (True, False)
    ],
    lr=settings.learning_rate,
    betas=(settings.b1, settings.b2),
    eps=settings.eps,
  )


@pytest.mark.parametrize("settings", [ADAMW, RMSPROP], ids=lambda s: s.name)
@pytest.mark.parametrize("trainable", ["base", "lora"])
def test_equals_torch_and_leaves_the_rest(settings, trainable):
  rng = np.random.default_rng(0)
  params = {"base": random_tree(rng), "lora": random_tree(rng)}
  # The second gradient is below the clip, the others are beyond it; the last
  # but one is zero.
  gradients = [
    random_tree(rng, scale) for scale in (1.0, 0.05, 3.0, 0.5, 0.0, 1.0)
  ]
  tx = optimizer_lib.make(settings, STEPS, trainable)
  state = tx.init(params)
  update = jax.jit(tx.update)
  parameters, optimizer = torch_weights(params[trainable], settings)
  warm = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min(1.0, (step + 1) / settings.warmup_steps)
  )
  frozen = "lora" if trainable == "base" else "base"
  before = jax.tree.map(np.copy, params[frozen])
  trained = params[trainable]
  for gradient in gradients:
    updates, state = update(
      {frozen: None, trainable: gradient}, state, {**params, trainable: trained}
    )
    assert updates[frozen] is None
    trained = optax.apply_updates(trained, updates[trainable])
    for parameter, leaf in zip(parameters, jax.tree.leaves(gradient)):
      parameter.grad = torch.tensor(leaf)
    torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    optimizer.step()
    warm.step()
    for parameter, leaf in zip(parameters, jax.tree.leaves(trained)):
      # torch adds 1e-6 to the norm that it clips by, which matters here by
      # less than one part in a million.
      np.testing.assert_allclose(leaf, parameter.detach(), rtol=5e-6, atol=2e-6)
  moved = [
    float(np.abs(a - b).max())
    for a, b in zip(
      jax.tree.leaves(trained), jax.tree.leaves(params[trainable])
    )
  ]
  assert min(moved) > 0.05
  jax.tree.map(np.testing.assert_array_equal, params[frozen], before)


def test_frozen_weights_take_no_memory_in_the_state():
  shapes = {
    "base": {"kernel": jnp.zeros((100, 100))},
    "lora": {"lora_a": jnp.zeros((3, 2)), "lora_b": jnp.zeros((2, 3))},
  }
  state = optimizer_lib.make(ADAMW, STEPS, "lora").init(shapes)
  # Two moments of twelve numbers, and counters.
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 30


def rates(steps, **values):
  schedule = optimizer_lib.schedule(
    dataclasses.replace(ADAMW, learning_rate=8.0, **values), steps
  )
  return [float(schedule(i)) for i in range(steps)]


def test_schedules_by_hand():
  close = functools.partial(pytest.approx, rel=1e-6)
  assert rates(6, warmup_steps=4) == close([2, 4, 6, 8, 8, 8])
  assert rates(3, warmup_steps=0) == close([8, 8, 8])
  assert rates(3, warmup_steps=1) == close([8, 8, 8])
  assert rates(2, warmup_steps=4) == close([2, 4])
  # After two updates of warm-up a half cosine over four: 1, cos^2 of pi/8,
  # pi/4 and 3 pi/8.
  cosine = [8 * math.cos(math.pi * i / 8) ** 2 for i in range(4)]
  assert rates(6, warmup_steps=2, schedule="cosine") == close([4, 8, *cosine])
  assert rates(4, warmup_steps=0, schedule="cosine") == close(cosine)
  assert rates(2, warmup_steps=2, schedule="cosine") == close([4, 8])
  assert rates(2, warmup_steps=9, schedule="cosine") == close([8 / 9, 16 / 9])
  settings = dataclasses.replace(ADAMW, schedule="cosine", warmup_steps=2)
  assert float(optimizer_lib.schedule(settings, 6)(6)) == 0


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"clip_norm": 0.0}, "optimizer.clip_norm=0.0 must be positive"),
    ({"name": "rmsprop"}, "optimizer.weight_decay=0.3"),
  ],
)
def test_settings_that_make_no_sense_are_refused(values, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(ADAMW, **values)

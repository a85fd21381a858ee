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
import transformers
from optax import contrib

from dpo_jax.training import optimizer as optimizer_lib

ADAMW = optimizer_lib.OptimizerSettings(
  name="adamw",
  learning_rate=0.02,
  schedule="constant",
  warmup_steps=3,
  warmup_ratio=0.0,
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


def updated(settings, tree, gradients):
  """The tree after updates by these gradients, all of it trained."""
  tx = optimizer_lib.make(settings, STEPS, "base")
  params = {"base": tree, "lora": {}}
  state = tx.init(params)
  step = jax.jit(tx.update)
  for grads in gradients:
    updates, state = step({"base": grads, "lora": None}, state, params)
    params = {"base": optax.apply_updates(params["base"], updates["base"])}
    params["lora"] = {}
  return params["base"]


def test_lion_is_its_papers():
  """Chen et al., 2023 (arXiv 2302.06675), Algorithm 2, in NumPy."""
  settings = dataclasses.replace(ADAMW, name="lion", clip_norm=1e9)
  rng = np.random.default_rng(0)
  tree, gradients = random_tree(rng), [random_tree(rng) for _ in range(3)]
  found = updated(settings, tree, gradients)

  def one(path, weight, *slopes):
    moment, decay = 0.0, 0.0 if path[-1].key in SPARED else 0.3
    for i, slope in enumerate(slopes):
      rate = 0.02 * (i + 1) / 3
      sign = np.sign(0.9 * moment + 0.1 * slope)
      weight = weight - rate * (sign + decay * weight)
      moment = 0.99 * moment + 0.01 * slope
    return weight

  wanted = jax.tree_util.tree_map_with_path(one, tree, *gradients)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    found,
    wanted,
  )


def test_adafactor_is_torchs_on_a_layer():
  settings = dataclasses.replace(
    ADAMW, name="adafactor", weight_decay=0.0, clip_norm=1e9
  )
  rng = np.random.default_rng(0)
  # The least size whose moments are factored.
  shape = (1, 128, 130)
  start, *slopes = rng.normal(size=(4, *shape)).astype(np.float32)

  def tree(kernel):
    return {"blocks": {"dense_h_to_4h": {"kernel": kernel}}}

  found = updated(settings, tree(start), [tree(x) for x in slopes])
  weight = torch.nn.Parameter(torch.tensor(start[0]))
  theirs = torch.optim.Adafactor([weight], lr=0.02)
  for i, slope in enumerate(slopes):
    theirs.param_groups[0]["lr"] = 0.02 * (i + 1) / 3
    weight.grad = torch.tensor(slope[0])
    theirs.step()
  step, wanted = (
    x - start[0]
    for x in (
      found["blocks"]["dense_h_to_4h"]["kernel"][0],
      weight.detach().numpy(),
    )
  )
  np.testing.assert_allclose(step, wanted, rtol=1e-4, atol=1e-6)
  # A second layer has moments of its own.
  state = optimizer_lib.make(settings, STEPS, "base").init(
    {"base": tree(np.zeros((2, *shape[1:]), np.float32)), "lora": {}}
  )
  sizes = [leaf.shape for leaf in jax.tree.leaves(state)]
  assert {(2, 128), (2, 130)} < {*sizes}


# Matrices of each layer: input and output sizes of kernels and adapters.
MATRICES = {
  "query_key_value": (6, (2, 3, 4)),
  "dense": ((2, 4), 6),
  "dense_h_to_4h": (6, 8),
  "dense_4h_to_h": (8, 6),
}


def test_muon_takes_each_layers_matrices_and_adamw_the_rest():
  settings = dataclasses.replace(ADAMW, name="muon", b1=0.95, clip_norm=1e9)
  rng = np.random.default_rng(1)

  def tree():
    def draw(*sizes):
      shape = (2, *np.concatenate([np.atleast_1d(x) for x in sizes]))
      return rng.normal(size=shape).astype(np.float32)

    blocks = {k: {"kernel": draw(*sizes)} for k, sizes in MATRICES.items()}
    blocks["mlp_norm"] = {"scale": draw(6), "bias": draw(6)}
    return {"blocks": blocks, "embed": {"kernel": draw(3)}}

  start, gradients = tree(), [tree() for _ in range(3)]
  found = updated(settings, start, gradients)
  # What is no matrix, as AdamW has it.
  adamw = updated(dataclasses.replace(settings, name="adamw"), start, gradients)
  for name in ("mlp_norm", "embed"):
    a, b = (x["blocks"].get(name) or x[name] for x in (found, adamw))
    jax.tree.map(np.testing.assert_array_equal, a, b)

  def of_layer(name, tree, layer):
    sizes = [int(np.prod(x)) for x in MATRICES[name]]
    return tree["blocks"][name]["kernel"][layer].reshape(sizes)

  rule = contrib.muon(
    optimizer_lib.schedule(settings, STEPS),
    beta=0.95,
    weight_decay=0.3,
    consistent_rms=0.2,
  )
  for name in MATRICES:
    for layer in range(2):
      weight = of_layer(name, start, layer)
      state = rule.init(weight)
      for slopes in gradients:
        step, state = rule.update(of_layer(name, slopes, layer), state, weight)
        weight = optax.apply_updates(weight, step)
      mine = of_layer(name, found, layer)
      # Sums of the iteration in another order.
      np.testing.assert_allclose(mine, weight, rtol=1e-4, atol=1e-5)
      assert np.abs(mine - of_layer(name, start, layer)).max() > 5e-3


def test_muons_first_update_is_torchs():
  settings = dataclasses.replace(ADAMW, name="muon", b1=0.95, warmup_steps=0)
  rng = np.random.default_rng(2)
  start, slope = rng.normal(size=(2, 1, 24, 32)).astype(np.float32)

  def tree(matrix):
    return {"blocks": {"dense_h_to_4h": {"kernel": jnp.asarray(matrix)}}}

  found = updated(settings, tree(start), [tree(slope)])
  # torch has the weights of a linear layer as [out, in].
  weight = torch.nn.Parameter(torch.tensor(start[0].T.copy()))
  theirs = torch.optim.Muon(
    [weight], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
  )
  weight.grad = torch.tensor(slope[0].T.copy())
  theirs.step()
  step = found["blocks"]["dense_h_to_4h"]["kernel"][0] - start[0]
  wanted = weight.detach().numpy().T - start[0]
  # torch iterates in bfloat16: two digits.
  np.testing.assert_allclose(step, wanted, atol=0.02 * np.abs(wanted).max())


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
  # A share of 7 updates, rounded up.
  share = rates(7, warmup_steps=0, warmup_ratio=0.4, schedule="linear")
  assert share == close([8 / 3, 16 / 3, 8, 8, 6, 4, 2])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_after_warm_up_are_those_of_transformers(schedule):
  weight = torch.nn.Parameter(torch.zeros(1))
  theirs = torch.optim.SGD([weight], lr=8.0)
  scheduler = transformers.get_scheduler(schedule, theirs, 3, 9)
  wanted = []
  for _ in range(9):
    wanted.append(theirs.param_groups[0]["lr"])
    theirs.step()
    scheduler.step()
  found = rates(9, warmup_steps=3, schedule=schedule)
  assert found[3:] == pytest.approx(wanted[3:], rel=1e-5)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"clip_norm": 0.0}, "optimizer.clip_norm=0.0 must be positive"),
    ({"name": "rmsprop"}, "optimizer.weight_decay=0.3"),
    ({"name": "adafactor"}, "weight_decay=0.3 with adafactor"),
    ({"warmup_ratio": 0.1}, "warmup_steps=3 and warmup_ratio=0.1"),
  ],
)
def test_settings_that_make_no_sense_are_refused(values, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(ADAMW, **values)

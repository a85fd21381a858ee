"""Updates and evaluations: accumulation, meshes, NaN, dropout, sums."""

import contextlib
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
from dpo_jax.data import packing, token_table
from dpo_jax.model import gpt_neox, logprobs
from dpo_jax.training import losses, optimizer
from dpo_jax.training import step as step_lib

LORA = dataclasses.replace(
  tiny.CONFIG, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
)
LOSS = tiny.loss(beta=0.5)
OPTIMIZER = optimizer.OptimizerSettings(
  "adamw", 0.01, "constant", 0, 0.0, 0.1, 0.9, 0.99, 1e-8, 1.0
)
PAIRS = 8


def pack(items, microbatches, layout="shared", rows=2, **values):
  """A batch of one shard a row."""
  how = {
    "layout": layout,
    "row_length": 40,
    "shards": rows,
    "microbatches": microbatches,
    "loss_on_prompt": False,
    "pad_id": 1,
  }
  return batch_lib.pack(items, packing.Packing(**(how | values)))[0]


def objective(kind="dpo", items=PAIRS):
  return step_lib.Objective(kind, LOSS if kind == "dpo" else None, items)


@functools.cache
def trainer(config, kind, items, seed=0):
  """A jitted step; one compilation for each shape of batch."""
  tx = optimizer.make(OPTIMIZER, 9, step_lib.trainable(config))
  step = step_lib.make_train_step(config, objective(kind, items), tx, seed)
  return jax.jit(step), tx


@functools.cache
def evaluator():
  """The jitted evaluation of pairs, for `pack(..., rows=6)`."""
  return jax.jit(step_lib.make_eval_step(LORA, objective()))


@pytest.fixture(scope="module")
def weights():
  return tiny.weights(LORA), tiny.adapters(LORA)


def leaves(tree):
  return {
    sharding.path_name(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def assert_close(a, b, rtol, atol):
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol, atol, err_msg=name)


# --- accumulation and meshes


def two_updates(microbatches, mesh=None):
  """Two updates of all weights; on a mesh, as the training loop does it."""
  base, reference = tiny.weights(tiny.CONFIG), tiny.weights(tiny.CONFIG, 7)
  step, tx = trainer(tiny.CONFIG, "dpo", PAIRS // microbatches)
  state = step_lib.init_state(base, {}, tx)
  split, context = None, contextlib.nullcontext()
  if mesh is not None:
    sharded = sharding.shardings(jax.eval_shape(lambda: state), mesh)
    state = jax.device_put(state, sharded)
    reference = jax.device_put(reference, sharding.shardings(reference, mesh))
    step = jax.jit(step, out_shardings=(sharded, sharding.replicated(mesh)))
    split = sharding.batch_sharding(mesh, leading=1)
    context = jax.set_mesh(mesh)
  history = []
  with context:
    for seed in (1, 2):
      # Eight rows whatever the mesh, so that only the mesh differs.
      batch = pack(tiny.pairs(PAIRS, seed), microbatches, rows=8)
      batch = jax.device_put(batch, split)
      state, metrics = step(state, reference, batch)
      history.append(jax.device_get(metrics))
  return state, history


@pytest.fixture(scope="module")
def single():
  """Two micro-batches a step, on one device."""
  return two_updates(2)


def assert_trained_alike(found, wanted):
  """The same metrics, and weights that went to the same place."""
  # Float32 sums in another order.
  assert_close(found[1], wanted[1], rtol=2e-5, atol=2e-6)
  weights, trained = (
    leaves(state.params["base"]) for state, _ in (found, wanted)
  )
  before = leaves(tiny.weights(tiny.CONFIG))
  for name, leaf in trained.items():
    assert np.abs(leaf - before[name]).max() > 5e-3
    if name == "blocks/query_key_value/bias":
      # A key's bias shifts all scores of a query alike where rotation does
      # not touch it: its gradient is rounding, which Adam turns into steps.
      continue
    # Adam divides by the gradient's own size, which magnifies the rounding of
    # small ones: a hundredth of a step of 0.01.
    np.testing.assert_allclose(weights[name], leaf, 0, 1e-4, err_msg=name)


def test_micro_batches_change_nothing(single):
  whole = two_updates(1)
  assert int(whole[0].step) == int(single[0].step) == 2
  assert_trained_alike(whole, single)


def test_micro_batches_share_one_compiled_body():
  base = tiny.weights(tiny.CONFIG)

  def products(microbatches):
    step, tx = trainer(tiny.CONFIG, "dpo", PAIRS // microbatches)
    batch = pack(tiny.pairs(PAIRS, 1), microbatches, rows=8)
    lowered = step.lower(step_lib.init_state(base, {}, tx), base, batch)
    text = lowered.compile().as_text()
    return lowered.as_text().count("stablehlo.dot_general"), text.count(" dot(")

  (traced, compiled), other = (products(m) for m in (2, 4))
  assert other == (traced, compiled)
  assert compiled > 0
  # One alone is the same program with a loop that goes round once.
  assert products(1)[0] == traced


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_meshes_give_the_numbers_of_one_device(single, sizes):
  mesh = sharding.make_mesh(*sizes)
  found = two_updates(2, mesh)
  assert_trained_alike(found, single)
  state, _ = found
  # Weights and moments are split, not copied.
  kernel = state.params["base"]["blocks"]["dense_h_to_4h"]["kernel"]
  shard = kernel.addressable_shards[0].data
  assert shard.size * mesh.shape["fsdp"] * mesh.shape["tensor"] == kernel.size
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    if sharding.path_name(path).endswith("blocks/dense_h_to_4h/kernel")
  ]
  assert [moment.sharding for moment in moments] == [kernel.sharding] * 2


def test_a_loss_that_is_not_finite_changes_nothing():
  base = tiny.weights(tiny.CONFIG)
  step, tx = trainer(tiny.CONFIG, "dpo", PAIRS // 2)
  items = tiny.pairs(PAIRS, 1)
  batch = pack(items, 2, rows=8)
  state, _ = step(step_lib.init_state(base, {}, tx), base, batch)
  token = items[5].chosen[0]
  embed = {"kernel": base["embed"]["kernel"].at[token].set(jnp.inf)}
  after, metrics = step(state, base | {"embed": embed}, batch)
  assert not np.isfinite(metrics["loss"])
  # Not a bit: neither weights nor moments nor their counters.
  assert_close(after.params, state.params, 0, 0)
  assert_close(after.opt_state, state.opt_state, 0, 0)
  assert (int(after.step), int(after.skipped)) == (2, 1)
  assert not metrics["applied"]
  # Without the infinity the same state is trained.
  again, metrics = step(after, base, batch)
  assert np.isfinite(metrics["loss"])
  assert (int(again.step), int(again.skipped)) == (3, 1)
  kernels = (
    leaves(s.params)["base/blocks/dense/kernel"] for s in (again, state)
  )
  assert not np.array_equal(*kernels)


def test_an_update_that_is_refused_changes_not_a_bit():
  """The loss is finite, but the gradient is not."""
  base = tiny.weights(tiny.CONFIG)
  loss = tiny.loss(beta=1e22)
  share = step_lib.Objective("dpo", loss, PAIRS)
  tx = optimizer.make(OPTIMIZER, 9, "base")
  step = jax.jit(step_lib.make_train_step(tiny.CONFIG, share, tx, 0))
  state = step_lib.init_state(base, {}, tx)
  after, metrics = step(state, base, pack(tiny.pairs(PAIRS, 1), 1, rows=8))
  # The gradient's squares do not fit float32; the loss does.
  assert np.isfinite(metrics["loss"])
  assert float(metrics["grad_norm"]) == np.inf
  assert_close(after.params, state.params, 0, 0)
  assert_close(after.opt_state, state.opt_state, 0, 0)


# --- evaluation


def test_evaluation_sums_what_is_there(weights):
  base, adapters = weights
  params = {"base": base, "lora": adapters}
  evaluate = evaluator()
  items = tiny.pairs(PAIRS + 3, 4)
  parts = [
    evaluate(params, None, pack(items[:PAIRS], 1, rows=6)),
    # Fewer than the objective says: what is missing counts for nothing.
    evaluate(params, None, pack(items[PAIRS:], 1, rows=6)),
  ]
  assert [float(part["weight"]) for part in parts] == [8.0, 3.0]
  # Each pair alone, in a batch of its own.
  alone = [evaluate(params, None, pack([item], 1, rows=6)) for item in items]
  for key in parts[0]:
    total = sum(float(part[key]) for part in parts)
    wanted = sum(float(part[key]) for part in alone)
    # Eleven float32 terms.
    assert total == pytest.approx(wanted, rel=1e-5, abs=1e-5), key
  # Exactly the rewards of exactly equal models.
  fresh = {"base": base, "lora": jax.tree.map(jnp.zeros_like, adapters)}
  none = evaluate(fresh, None, pack(items[:PAIRS], 1, rows=6))
  assert float(none["rewards/margins"]) == pytest.approx(0, abs=1e-5)
  assert float(none["loss"]) == pytest.approx(8 * np.log(2), rel=1e-6)


def test_spread_and_right_words_of_an_evaluation_by_hand(weights):
  base, adapters = weights
  evaluate = evaluator()
  items = tiny.pairs(PAIRS, 4)
  for i in (0, 3):
    # A model of random weights is right where it is made so.
    logps, at = sequence(LORA, base, items[i].prompt, items[i].chosen)
    best = int(logps[at[0]].argmax())
    items[i] = dataclasses.replace(
      items[i], chosen=(best, *items[i].chosen[1:])
    )
  params = {"base": base, "lora": jax.tree.map(jnp.zeros_like, adapters)}
  found = evaluate(params, None, pack(items, 1, rows=6))
  spread = right = tokens = chosen = 0
  for item in items:
    for response in (item.chosen, item.rejected):
      logps, at = sequence(LORA, base, item.prompt, response)
      spread -= (np.exp(logps[at]) * logps[at]).sum()
      tokens += len(response)
      if response is item.chosen:
        right += (logps[at].argmax(-1) == response).sum()
        chosen += len(response)
  assert 2 <= right < chosen
  assert float(found["mean_token_accuracy"]) == right
  assert float(found["tokens"]) == tokens
  assert float(found["chosen_tokens"]) == chosen
  assert float(found["entropy"]) == pytest.approx(spread, rel=1e-5)


# Every kind that one program can hold, and what the others need.
SUMS = {
  "every": {
    "kind": "+".join(
      kind
      for kind, loss in losses.LOSSES.items()
      if kind != "exo_pair" and not loss.whole_batch
    )
  },
  "alone": {"kind": "cpo+0.2*sft+0.1*unlikelihood"},
  "sorted": {"kind": "aot+0.5*aot_unpaired+0.2*sft"},
  "tokens": {
    "kind": "sigmoid+exo_pair+0.3*sft",
    "label_smoothing": 0.1,
    "per_token": True,
    "divergence": "forward_kl",
    "ld_alpha": 0.25,
    "wpo": True,
  },
}


def responses_by_numpy(config, base, adapters, items):
  """For each response: (logps, their log square sums) of its tokens."""
  found = []
  for item in items:
    for response in (item.chosen, item.rejected):
      logps, at = sequence(config, base, item.prompt, response, adapters)
      rows = logps[at].astype(np.float64)
      picked = rows[np.arange(len(response)), list(response)]
      found.append((picked, np.log(np.exp(2 * rows).sum(-1))))
  return found


def pair_by_numpy(settings, policy, reference):
  """A `losses.Pair` of those log-probs."""
  count = len(policy) // 2

  def both(values):
    return losses.Responses(*jnp.float32(values).reshape(count, 2).T)

  lengths = np.array([len(x) for x, _ in policy])
  shorter = np.repeat(lengths.reshape(-1, 2).min(1), 2)
  ratios = [
    ((x - y)[:n].sum() + settings.ld_alpha * (x - y)[n:].sum())
    for (x, _), (y, _), n in zip(policy, reference, shorter)
  ]
  return losses.Pair(
    both([x.sum() for x, _ in policy]),
    both([x.sum() for x, _ in reference]),
    both(ratios),
    both(lengths),
    on_policy=both([(x - squares).mean() for x, squares in policy])
    if settings.wpo
    else None,
  )


@pytest.mark.parametrize("name", SUMS)
def test_losses_of_a_step_are_those_of_plain_log_probs(weights, name):
  base, adapters = weights
  settings = tiny.loss(beta=0.5, **SUMS[name])
  items = tiny.pairs(PAIRS - 3, 4)
  policy = responses_by_numpy(LORA, base, adapters, items)
  reference = responses_by_numpy(LORA, base, None, items)
  pair = pair_by_numpy(settings, policy, reference)
  parts = losses.preference_losses(settings, pair)
  wanted = {kind: float(jnp.mean(x)) for kind, x in parts.items()}
  wanted["sft"] *= len(items) / float(jnp.sum(pair.lengths.chosen))
  share = step_lib.Objective("dpo", settings, PAIRS)
  evaluate = jax.jit(step_lib.make_eval_step(LORA, share))
  params = {"base": base, "lora": adapters}
  # A batch that is not full, of pairs in several shards.
  sums = evaluate(params, None, pack(items, 1, rows=6))
  found = share.means({key: float(value) for key, value in sums.items()})
  for kind, value in wanted.items():
    assert found[f"loss/{kind}"] == pytest.approx(value, rel=1e-4), kind
  rewards = pair.policy if name == "alone" else pair.ratios
  assert found["rewards/chosen"] == pytest.approx(
    0.5 * float(jnp.mean(rewards.chosen)), rel=1e-4
  )
  total = sum(w * wanted[kind] for kind, w in settings.weights.items())
  assert found["loss"] == pytest.approx(total, rel=1e-4)


def updated(config, settings, items, microbatches, layout, mesh=None):
  """The state and metrics after an update of `items`."""
  full = config.lora is None
  base = tiny.weights(config)
  reference = tiny.weights(config, 7) if full else None
  share = step_lib.Objective("dpo", settings, len(items) // microbatches)
  tx = optimizer.make(OPTIMIZER, 9, step_lib.trainable(config))
  step = step_lib.make_train_step(config, share, tx, 0)
  lora = {} if full else tiny.adapters(config)
  state = step_lib.init_state(base, lora, tx)
  batch = pack(items, microbatches, layout, rows=8)
  if mesh is None:
    return jax.jit(step)(state, reference, batch)
  sharded = sharding.shardings(jax.eval_shape(lambda: state), mesh)
  step = jax.jit(step, out_shardings=(sharded, sharding.replicated(mesh)))
  with jax.set_mesh(mesh):
    return step(
      jax.device_put(state, sharded),
      reference,
      jax.device_put(batch, sharding.batch_sharding(mesh, leading=1)),
    )


@pytest.mark.parametrize(
  ("name", "config", "other"),
  [
    ("tokens", tiny.CONFIG, (4, "padded")),
    ("sorted", LORA, (1, "packed", sharding.make_mesh(2, 2, 2))),
  ],
)
def test_losses_do_not_depend_on_how_they_are_computed(name, config, other):
  settings, items = tiny.loss(beta=0.5, **SUMS[name]), tiny.pairs(PAIRS, 2)
  state, metrics = updated(config, settings, items, 1, "shared")
  found = updated(config, settings, items, *other)
  # Float32 sums in another order.
  assert_close(found[1], metrics, rtol=2e-5, atol=2e-6)
  after, before = (
    leaves(x.params[step_lib.trainable(config)]) for x in (found[0], state)
  )
  # See `assert_trained_alike`.
  for leaf in after.keys() - {"blocks/query_key_value/bias"}:
    np.testing.assert_allclose(after[leaf], before[leaf], 0, 1e-4, err_msg=leaf)


def labeled(count):
  """A table of labeled responses, and of the next one's to its prompt."""
  table = token_table.from_items(tiny.pairs(count, 4))
  return dataclasses.replace(table, desirable=np.arange(count) % 3 != 1)


def test_kto_by_plain_log_probs(weights):
  base, adapters = weights
  settings = tiny.loss(kind="kto", beta=0.5, undesirable_weight=2.0)
  table = labeled(PAIRS - 3)
  policy, reference = (
    np.array([x.sum() for x, _ in responses_by_numpy(LORA, base, lora, table)])
    for lora in (adapters, None)
  )
  ratios = (policy - reference).reshape(-1, 2)
  point = max(ratios[:, 1].mean(), 0.0)
  rewards, good = 0.5 * ratios[:, 0], table.desirable
  ahead = np.where(good, 1, -1) * (rewards - 0.5 * point)
  wanted = {
    "loss": (np.where(good, 1, 2) / (1 + np.exp(ahead))).mean(),
    "kl": point,
    "rewards/chosen": rewards[good].mean(),
    "rewards/rejected": rewards[~good].mean(),
    "rewards/margins": rewards[good].mean() - rewards[~good].mean(),
    "logps/chosen": policy[::2][good].mean(),
    "logps/rejected": policy[::2][~good].mean(),
  }
  share = step_lib.Objective("dpo", settings, PAIRS)
  evaluate = jax.jit(step_lib.make_eval_step(LORA, share))
  params = {"base": base, "lora": adapters}
  batch = pack(table, 1, rows=6)
  sums = evaluate(params, None, batch)
  found = share.means({key: float(value) for key, value in sums.items()})
  # Accuracy and entropy are of the items' own responses.
  tokens = table.lengths[:, 1].sum()
  assert float(sums["tokens"]) == float(sums["chosen_tokens"]) == tokens
  for key, value in wanted.items():
    assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
  assert "rewards/accuracies" not in found
  assert point > 0

  # An update over a mesh has the same numbers.
  mesh = sharding.make_mesh(8, 1, 1)
  _, metrics = updated(LORA, settings, table, 1, "padded", mesh)
  for key, value in wanted.items():
    assert float(metrics[key]) == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_a_loss_of_the_policy_alone_computes_no_reference():
  batch = pack(tiny.pairs(PAIRS, 1), 1, rows=8)
  known = dataclasses.replace(
    batch, reference=np.zeros(batch.target.shape, np.float32)
  )

  def flops(kind, config, batch):
    share = step_lib.Objective("dpo", tiny.loss(kind=kind), PAIRS)
    base = tiny.weights(config)
    tx = optimizer.make(OPTIMIZER, 9, step_lib.trainable(config))
    lora = tiny.adapters(config) if config.lora else {}
    step = step_lib.make_train_step(config, share, tx, 0)
    reference = None if config.lora or kind == "simpo" else base
    state = step_lib.init_state(base, lora, tx)
    return operations.flops(jax.make_jaxpr(step)(state, reference, batch).jaxpr)

  for config in (LORA, tiny.CONFIG):
    alone = flops("simpo", config, batch)
    assert alone == flops("sigmoid", config, known)
    assert alone < 0.8 * flops("sigmoid", config, batch)


def test_means_by_hand():
  sums = {"weight": 3.0, "entropy": 8.0, "tokens": 4.0}
  sums |= {"mean_token_accuracy": 1.0, "chosen_tokens": 2.0}
  means = {"entropy": 2.0, "mean_token_accuracy": 0.5}
  assert objective().means(sums | {"loss": 6.0}) == means | {"loss": 2.0}
  # The SFT term is a mean over chosen tokens.
  mixed = dataclasses.replace(objective(), loss=tiny.loss(kind="ipo+0.2*sft"))
  parts = {"loss/ipo": 6.0, "loss/sft": 5.0}
  wanted = {"loss/ipo": 2.0, "loss/sft": 2.5, "loss": 2.5}
  assert mixed.means(sums | parts) == means | wanted


def test_evaluation_of_sft_sums_over_tokens():
  base = tiny.weights(tiny.CONFIG)
  items = [
    token_table.Example(pair.id, pair.prompt, pair.chosen)
    for pair in tiny.pairs(3, 3)
  ]
  evaluate = jax.jit(step_lib.make_eval_step(tiny.CONFIG, objective("sft", 4)))
  found = evaluate({"base": base}, None, pack(items, 1, layout="packed"))
  assert float(found["weight"]) == sum(len(item.response) for item in items)
  wanted = sum(nll(tiny.CONFIG, base, item) for item in items)
  assert float(found["loss"]) == pytest.approx(wanted, rel=1e-5)


# --- supervised fine-tuning


def nll(config, base, item):
  """Summed -log p of an example's response, from all logits of one row."""
  logps, at = sequence(config, base, item.prompt, item.response)
  return -logps[at, list(item.response)].sum()


def sequence(config, base, prompt, response, adapters=None):
  """All log-probs of a row, [T, V], and which of them predict the response."""
  tokens = np.zeros((1, 16), np.int32)
  whole = prompt + response
  tokens[0, : len(whole)] = whole
  logits = np.asarray(plain_logits(config, base, adapters, tokens), np.float64)[
    0
  ]
  logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return logps, np.arange(len(prompt) - 1, len(whole) - 1)


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(config, base, adapters, tokens):
  size = tokens.shape[1]
  mask = jnp.tril(jnp.ones((1, size, size), bool))
  hidden, _ = gpt_neox.apply(
    config, base, adapters, tokens, jnp.arange(size)[None], mask
  )
  return gpt_neox.unembed(base, hidden)


def test_sft_minimises_the_mean_over_tokens():
  base = tiny.weights(tiny.CONFIG)
  items = [
    token_table.Example(pair.id, pair.prompt, pair.chosen)
    for pair in tiny.pairs(6, 3)
  ]
  step, tx = trainer(tiny.CONFIG, "sft", 3)
  state = step_lib.init_state(base, {}, tx)
  batch = pack(items, 2, layout="packed", rows=2)
  # The two micro-batches have different numbers of tokens, which a mean of
  # their means would weigh alike.
  tokens = [sum(len(i.response) for i in items[a : a + 3]) for a in (0, 3)]
  assert tokens[0] != tokens[1]
  state, metrics = step(state, None, batch)
  wanted = sum(nll(tiny.CONFIG, base, item) for item in items) / sum(tokens)
  assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-5)
  assert metrics.keys() == {"loss", "grad_norm", "applied", "skipped"}
  for _ in range(3):
    state, metrics = step(state, None, batch)
  assert float(metrics["loss"]) < wanted - 0.05


# --- dropout


DROPPED = dataclasses.replace(
  LORA, lora=dataclasses.replace(LORA.lora, dropout=0.5)
)


def dropped(weights, layout, microbatches, rows, seed=3):
  tx = optimizer.make(OPTIMIZER, 9, "lora")
  share = objective(items=PAIRS // microbatches)
  step = jax.jit(step_lib.make_train_step(DROPPED, share, tx, seed))
  batch = pack(tiny.pairs(PAIRS, 6), microbatches, layout=layout, rows=rows)
  state, metrics = step(step_lib.init_state(*weights, tx), None, batch)
  return state.params["lora"], metrics


@pytest.fixture(scope="module")
def shared_rows(weights):
  return dropped(weights, "shared", 2, 1)


@pytest.mark.parametrize(
  ("layout", "microbatches", "rows"), [("padded", 2, 1), ("shared", 4, 4)]
)
def test_dropout_does_not_depend_on_the_layout(
  weights, shared_rows, layout, microbatches, rows
):
  found = dropped(weights, layout, microbatches, rows)
  # Float32 sums in another order; Adam magnifies those of small gradients.
  assert_close(found[1], shared_rows[1], rtol=2e-5, atol=2e-6)
  assert_close(found[0], shared_rows[0], rtol=0, atol=1e-4)
  assert abs(float(found[1]["loss"]) - float(np.log(2))) > 1e-3


def test_the_seed_decides_dropout(weights, shared_rows):
  other = dropped(weights, "shared", 2, 1, seed=4)
  assert float(other[1]["loss"]) != float(shared_rows[1]["loss"])


def test_dropout_is_drawn_for_each_step_and_token(weights):
  tx = optimizer.make(OPTIMIZER, 9, "lora")
  make = step_lib.make_train_step(DROPPED, objective(items=1), tx, seed=3)
  step = jax.jit(make)
  (pair,) = tiny.pairs(1)
  state = step_lib.init_state(*weights, tx)

  def loss(state):
    return step(state, None, pack([pair] * 2, 2, rows=1))[1]

  first, again = loss(state), loss(state)
  assert float(first["loss"]) == float(again["loss"])
  later = loss(dataclasses.replace(state, step=jnp.int32(1)))
  assert float(later["loss"]) != float(first["loss"])
  # Both micro-batches hold the same pair. Were they dropped alike, the mean of
  # their margins would be one's own, and the loss that of the mean.
  apart = -np.log(1 / (1 + np.exp(-float(first["rewards/margins"]))))
  assert float(first["loss"]) > apart + 1e-4


# --- bfloat16


def test_in_bfloat16_policy_and_reference_start_equal():
  # Rows so long, and a beta so large, that without the options of the compiler
  # the loss is 0.3 away from ln 2.
  config = dataclasses.replace(
    LORA, dtype="bfloat16", heads=4, mlp_width=64, vocab_size=512
  )
  pairs = tiny.pairs(4, 0, (32, 64), (32, 64), config)
  batch = pack(pairs, 1, row_length=256, rows=4)
  loss = tiny.loss(beta=5.0)
  tx = optimizer.make(OPTIMIZER, 9, "lora")
  step = jax.jit(
    step_lib.make_train_step(config, step_lib.Objective("dpo", loss, 4), tx, 0),
    compiler_options=step_lib.COMPILER_OPTIONS,
  )
  adapters = gpt_neox.init_lora(config, jax.random.key(1))
  state = step_lib.init_state(tiny.weights(config), adapters, tx)
  _, metrics = step(state, None, batch)
  assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6)
  assert float(metrics["rewards/accuracies"]) == 0.5


# --- sums


def test_sums_of_a_pair_by_hand():
  pair = token_table.Pair("i", (2,), (3,) * 1024, (4,) * 1024)
  batch = pack([pair], 1, rows=1, row_length=2049)
  micro = jax.tree.map(lambda x: x[0], batch)
  is_chosen = micro.sequence_ids == 0
  # Tokens of a thousand nats, and a reference that is 2^-10 nats away: a
  # difference of sums, each a million nats, would keep nothing of it.
  policy = jnp.where(is_chosen, -1000.0, -2000.0)
  other = policy - jnp.where(is_chosen, 2.0**-10, 0.0)
  stats = logprobs.TokenStats(policy, *[jnp.zeros_like(policy)] * 3)
  sums, weights = step_lib._objective_sums(
    objective(items=1), micro, stats, other
  )
  assert float(weights["weight"]) == 1
  # Beta is a half, and a thousand and twenty-four 2^-10 are one nat.
  assert float(sums["rewards/chosen"]) == 0.5
  assert float(sums["rewards/rejected"]) == 0
  assert float(sums["loss"]) == pytest.approx(np.log1p(np.exp(-0.5)))
  assert float(sums["logps/chosen"]) == -1_024_000
  assert float(sums["logps/rejected"]) == -2_048_000

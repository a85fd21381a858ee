"""Training and evaluation steps: pure functions of state and batch, under jit.

Gradients are taken of the trainable subtree alone: the adapters, or in full
fine-tuning the base. The reference of DPO is the same base with the adapters
off, or in full fine-tuning a tree of its own. Gradient accumulation is a scan
over the batch's micro-batches, with one as its shortest case, so that there is
one compiled body.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dpo_jax.core import precision, sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.model import attention, gpt_neox, logprobs
from dpo_jax.training import guards, losses

Tree = dict[str, Any]
Metrics = dict[str, jax.Array]

# Options for jax.jit of both steps. Where a program says bfloat16, XLA may keep
# float32 between two operations, and does so in the policy, whose values are
# kept for the gradient, elsewhere than in the reference: rewards of several
# hundredths of a nat before any training.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes, and the frozen weights beside it.

  `step` counts finished steps, made updates or not; `params` is {"base": ...,
  "lora": ...}, with an empty `lora` in full fine-tuning.
  """

  step: jax.Array
  params: Tree
  opt_state: optax.OptState
  guard: guards.GuardState


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a step minimises.

  Attributes:
    kind: "sft", the mean negative log-prob of a batch's completion tokens, or
      "dpo", the mean preference loss of its pairs.
    loss: the preference loss; unused by "sft".
    items: pairs or examples in one micro-batch.
  """

  kind: Literal["sft", "dpo"]
  loss: losses.LossSettings | None
  items: int


def trainable(config: gpt_neox.ModelConfig) -> str:
  """Which subtree of the params is trained."""
  return "lora" if config.lora is not None else "base"


def init_state(
  base: Tree, lora: Tree, tx: optax.GradientTransformation
) -> TrainState:
  params = {"base": base, "lora": lora}
  step = jnp.zeros((), jnp.int32)
  return TrainState(step, params, tx.init(params), guards.init())


def sequence_logps(
  config: gpt_neox.ModelConfig,
  base: Tree,
  lora: Tree | None,
  batch: batch_lib.Batch,
  sequences: int,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Summed log-probs and lengths of one micro-batch's sequences.

  Args:
    config: the model.
    base: base weights.
    lora: adapters, or None for the base alone.
    batch: one micro-batch, leaves [B, ...] and [S, ...].
    sequences: how many sequences the micro-batch owns.
    dropout_key: key of LoRA's dropout, or None.

  Returns:
    Sums in nats and token counts, float32 [sequences].
  """
  per_token = token_logps(config, base, lora, batch, dropout_key)
  return logprobs.sequence_sums(per_token, batch.sequence_ids, sequences)


def token_logps(
  config: gpt_neox.ModelConfig,
  base: Tree,
  lora: Tree | None,
  batch: batch_lib.Batch,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Log-prob of every completion token of a micro-batch, float32 [S, C]."""
  return token_stats(config, base, lora, batch, dropout_key).logps


def token_stats(
  config: gpt_neox.ModelConfig,
  base: Tree,
  lora: Tree | None,
  batch: batch_lib.Batch,
  dropout_key: jax.Array | None = None,
) -> logprobs.TokenStats:
  """Log-prob, entropy and likeliest word at every completion token, [S, C].

  Dropout is drawn for each token by its seat, so that it does not depend on
  how the step's items are laid out, split or sharded.
  """
  with precision.matmul_precision(config.dtype):
    hidden, _ = gpt_neox.apply(
      config,
      base,
      lora,
      *_seen_by_model(batch),
      dropout_key=_key_of_seats(dropout_key, batch),
    )
    return _stats(config, base["unembed"]["kernel"], hidden, batch)


def both_token_stats(
  config: gpt_neox.ModelConfig,
  base: Tree,
  lora: Tree,
  batch: batch_lib.Batch,
  dropout_key: jax.Array | None = None,
) -> tuple[logprobs.TokenStats, logprobs.TokenStats]:
  """`token_stats` with the adapters and without, by one pass of the base.

  Of the second, the reference's, no gradient is formed.
  """
  with precision.matmul_precision(config.dtype):
    policy, reference = gpt_neox.apply_both(
      config,
      base,
      lora,
      *_seen_by_model(batch),
      dropout_key=_key_of_seats(dropout_key, batch),
    )
    kernel = base["unembed"]["kernel"].astype(policy.dtype)
    kernel = sharding.constrain(kernel, None, "vocab")
    return tuple(
      _stats(config, kernel, hidden, batch)
      for hidden in (policy, jax.lax.stop_gradient(reference))
    )


def make_train_step(
  config: gpt_neox.ModelConfig,
  objective: Objective,
  tx: optax.GradientTransformation,
  seed: int,
) -> Callable[[TrainState, Tree | None, batch_lib.Batch], tuple]:
  """The update: (state, reference, batch) -> (state, metrics).

  `reference` is None with LoRA, whose reference is the base, for SFT, and where
  the batch carries the reference's log-probs; otherwise a base tree. An update
  that `guards.decide` refuses leaves weights and optimizer as they were; the
  metrics tell.
  """
  name = trainable(config)
  with_lora = config.lora is not None

  def train_step(state, reference, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    frozen = state.params["base"]
    scale = _loss_scale(objective, batch)

    def loss(params, micro):
      base, lora = (frozen, params) if with_lora else (params, None)
      dropout_key = key if with_lora else None
      policy, other = _compared(
        config, objective, base, lora, reference, micro, dropout_key
      )
      sums, _ = _objective_sums(objective, micro, policy.logps, other)
      return sums["loss"] * scale, sums

    def accumulate(grads, micro):
      # Around the backward pass, whose own rules are traced outside of `loss`.
      with precision.matmul_precision(config.dtype):
        grad, sums = jax.grad(loss, has_aux=True)(state.params[name], micro)
      return jax.tree.map(jnp.add, grads, grad), sums

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), state.params[name]
    )
    grads, sums = jax.lax.scan(accumulate, zeros, batch)
    metrics = {key: jnp.sum(value) * scale for key, value in sums.items()}
    metrics["grad_norm"] = optax.tree.norm(grads)
    make, guarded, told = guards.decide(
      state.guard, metrics["loss"], metrics["grad_norm"]
    )
    updates, opt_state = tx.update(
      {"base": None, "lora": None} | {name: grads},
      state.opt_state,
      state.params,
    )
    updated = optax.apply_updates(state.params[name], updates[name])
    params, opt_state = _where(
      make, (updated, opt_state), (state.params[name], state.opt_state)
    )
    state = TrainState(
      state.step + 1, state.params | {name: params}, opt_state, guarded
    )
    return state, metrics | told

  return train_step


def make_eval_step(
  config: gpt_neox.ModelConfig, objective: Objective
) -> Callable[[Tree, Tree | None, batch_lib.Batch], Metrics]:
  """(params, reference, batch) -> sums of the metrics, and their weights.

  "weight" is the number of pairs, or for SFT of completion tokens. "entropy" is
  in nats and of all completion tokens, "mean_token_accuracy" of those that the
  likeliest word is right for, chosen ones alone, as in TRL; "tokens" and
  "chosen_tokens" are their weights. `means` divides sums of many batches by
  those of their weights. A batch may hold fewer items than the objective says:
  what owns no token does not count.
  """
  with_lora = config.lora is not None

  def eval_step(params, reference, batch):
    micro = jax.tree.map(lambda x: x[0], batch)
    lora = params["lora"] if with_lora else None
    policy, other = _compared(
      config, objective, params["base"], lora, reference, micro
    )
    sums, weight = _objective_sums(objective, micro, policy.logps, other)
    return sums | {"weight": weight} | _token_sums(objective, micro, policy)

  return eval_step


def means(sums: dict[str, float]) -> dict[str, float]:
  """Metrics of an evaluation, from sums over its batches."""
  weights = {"entropy": "tokens", "mean_token_accuracy": "chosen_tokens"}
  left = {"weight", *weights.values()}
  return {
    key: value / sums[weights.get(key, "weight")]
    for key, value in sums.items()
    if key not in left
  }


def _token_sums(objective, batch, stats) -> Metrics:
  """Sums over tokens of what the likeliest words and their spread tell."""
  there = batch.sequence_ids >= 0
  # Chosen responses own the even sequences of pairs; examples have no others.
  chosen = (
    there & (batch.sequence_ids % 2 == 0) if objective.kind == "dpo" else there
  )
  return {
    "entropy": jnp.sum(jnp.where(there, stats.entropy, 0)),
    "tokens": jnp.sum(there.astype(jnp.float32)),
    "mean_token_accuracy": jnp.sum(
      (chosen & (stats.top == batch.target)).astype(jnp.float32)
    ),
    "chosen_tokens": jnp.sum(chosen.astype(jnp.float32)),
  }


def _compared(
  config, objective, base, lora, reference, batch, dropout_key=None
) -> tuple[logprobs.TokenStats, jax.Array | None]:
  """The policy's statistics, and the reference's log-probs if it has one.

  These are the batch's own, or computed: of the base in one pass with the
  policy, or without adapters of the tree `reference`.
  """
  if objective.kind == "dpo" and batch.reference is None and lora is not None:
    policy, other = both_token_stats(config, base, lora, batch, dropout_key)
    return policy, other.logps
  policy = token_stats(config, base, lora, batch, dropout_key)
  if objective.kind == "sft":
    return policy, None
  if batch.reference is not None:
    return policy, batch.reference
  other = token_logps(config, reference, None, batch)
  return policy, jax.lax.stop_gradient(other)


def _seen_by_model(batch):
  """Tokens, positions and segments of a micro-batch."""
  segments = attention.Segments(
    batch.segment_ids, batch.part_ids, batch.block_pairs
  )
  return batch.tokens, batch.positions, segments


def _key_of_seats(key, batch):
  """A key for each token, [B, T]; None without one."""
  if key is None:
    return None
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))
  return fold(key, batch.dropout_ids)


def _stats(config, kernel, hidden, batch) -> logprobs.TokenStats:
  return logprobs.token_stats(
    hidden,
    kernel,
    batch.source,
    batch.target,
    chunk=config.logit_chunk,
    words=config.vocab_tile,
  )


def _loss_scale(objective: Objective, batch: batch_lib.Batch) -> jax.Array:
  """One over what the sums of all micro-batches are divided by."""
  if objective.kind == "dpo":
    return jnp.float32(1 / (objective.items * batch.tokens.shape[0]))
  return 1 / jnp.sum(batch.sequence_ids >= 0).astype(jnp.float32)


def _objective_sums(objective, batch, policy, reference):
  """Sums over a micro-batch of the loss and metrics, and their weight.

  `policy` and, for DPO, `reference` are log-probs of tokens, [S, C].
  """
  if objective.kind == "sft":
    sums, lengths = logprobs.sequence_sums(
      policy, batch.sequence_ids, objective.items
    )
    return {"loss": -jnp.sum(sums)}, jnp.sum(lengths)

  def by_pair(per_token):
    return _pairs(
      logprobs.sequence_sums(per_token, batch.sequence_ids, 2 * objective.items)
    )

  # Subtracted token by token: the difference of two sums of a thousand nats
  # would keep no more digits than the rounding of those sums.
  ratios = by_pair(policy - reference)
  zero = jax.tree.map(jnp.zeros_like, ratios)
  policy = by_pair(policy)
  there = (policy.chosen_length > 0).astype(jnp.float32)
  values = losses.reward_metrics(ratios, zero, beta=objective.loss.beta) | {
    "loss": losses.preference_loss(objective.loss, ratios, zero),
    "logps/chosen": policy.chosen,
    "logps/rejected": policy.rejected,
  }
  sums = {key: jnp.sum(value * there) for key, value in values.items()}
  return sums, jnp.sum(there)


def _pairs(sums_and_lengths) -> losses.PairLogps:
  """Sequences 2i and 2i + 1 as chosen and rejected of pair i."""
  (chosen, rejected), (chosen_length, rejected_length) = (
    x.reshape(-1, 2).T for x in sums_and_lengths
  )
  return losses.PairLogps(chosen, rejected, chosen_length, rejected_length)


def _where(condition, new, old):
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)

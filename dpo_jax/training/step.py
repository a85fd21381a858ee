"""Training and evaluation steps: pure functions of state and batch, under jit.

Gradients are of the trainable subtree alone: the adapters, or in full
fine-tuning the base. The reference of DPO is the same base with the adapters
off, or in full fine-tuning a second tree. Gradient accumulation is a scan over
the batch's micro-batches; a batch of one is the same program.
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
from dpo_jax.training import guards, losses, pair_metrics

Tree = dict[str, Any]
Metrics = dict[str, jax.Array]

# Options for jax.jit of both steps. Where a program says bfloat16, XLA may keep
# float32 between two operations, and does so in the policy, whose activations
# are kept for the gradient, at other places than in the reference: rewards of
# several hundredths of a nat before any training.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes, and the frozen weights."""

  # Finished steps, and those whose update was skipped, int32 [].
  step: jax.Array
  # {"base": ..., "lora": ...}; `lora` is {} in full fine-tuning.
  params: Tree
  opt_state: optax.OptState
  skipped: jax.Array


# Sums by which those of metrics are divided.
_WEIGHTS = ("weight", "tokens", "chosen_tokens", "desirable", "undesirable")


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a step minimizes.

  Attributes:
    kind: "sft", the mean negative log-prob of a batch's completion tokens, or
      "dpo", the preference loss of its pairs.
    loss: the preference loss; unused by "sft".
    items: pairs or examples in one micro-batch.
  """

  kind: Literal["sft", "dpo"]
  loss: losses.LossSettings | None
  items: int

  @property
  def has_reference(self) -> bool:
    return self.kind == "dpo" and not self.loss.reference_free

  def weight_of(self, metric: str) -> str:
    """Name of the number by which a metric's sum is divided."""
    weights = {"entropy": "tokens", "mean_token_accuracy": "chosen_tokens"}
    if self.loss and self.loss.labeled and "/" in metric:
      return "desirable" if "/chosen" in metric else "undesirable"
    for kind, loss in self.loss.losses if self.loss else ():
      if loss.per_chosen_token:
        weights[self.loss.metric(kind)] = "chosen_tokens"
    return weights.get(metric, "weight")

  def with_loss(self, means: Metrics) -> Metrics:
    """The metrics and their loss: the weighted sum of its kinds' losses."""
    if self.loss and self.loss.labeled:
      margin = means["rewards/chosen"] - means["rewards/rejected"]
      means = means | {"rewards/margins": margin}
    if "loss" in means:
      return means
    parts = [
      weight * means[self.loss.metric(kind)]
      for kind, weight in self.loss.weights.items()
    ]
    return {"loss": sum(parts)} | means

  def means(self, sums: dict[str, float]) -> dict[str, float]:
    """Metrics of an evaluation, from sums over its batches."""
    return self.with_loss(
      {
        key: value / max(sums[self.weight_of(key)], 1)
        for key, value in sums.items()
        if key not in _WEIGHTS
      }
    )


def trainable(config: gpt_neox.ModelConfig) -> str:
  """The trainable subtree of the params: "lora" or "base"."""
  return "lora" if config.lora is not None else "base"


def init_state(
  base: Tree, lora: Tree, tx: optax.GradientTransformation
) -> TrainState:
  params = {"base": base, "lora": lora}
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, tx.init(params), zero)


def sequence_logps(
  config: gpt_neox.ModelConfig,
  base: Tree,
  lora: Tree | None,
  batch: batch_lib.Batch,
  sequences: int,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Summed log-probs in nats and lengths of a micro-batch's sequences.

  Float32 [sequences]; `lora` None is the base alone.
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
  """Log-prob, entropy and argmax at every completion token, [S, C].

  Dropout is drawn for each token by its dropout id, so that it does not depend
  on how the step's items are packed, split or sharded.
  """
  with precision.matmul_precision(config.dtype):
    hidden, _ = gpt_neox.apply(
      config,
      base,
      lora,
      *_model_inputs(batch),
      dropout_key=_token_keys(dropout_key, batch),
    )
    return _stats(config, base["unembed"]["kernel"], hidden, batch)


def both_token_stats(
  config: gpt_neox.ModelConfig,
  base: Tree,
  lora: Tree,
  batch: batch_lib.Batch,
  dropout_key: jax.Array | None = None,
) -> tuple[logprobs.TokenStats, logprobs.TokenStats]:
  """`token_stats` with and without adapters, in one pass of the base.

  The second, the reference's, carries no gradient.
  """
  with precision.matmul_precision(config.dtype):
    policy, reference = gpt_neox.apply_both(
      config,
      base,
      lora,
      *_model_inputs(batch),
      dropout_key=_token_keys(dropout_key, batch),
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

  `reference` is a base tree in full fine-tuning by DPO; None with LoRA, whose
  reference is the base, for SFT, and where the batch carries the reference's
  log-probs. An update that is not `guards.finite` leaves weights and optimizer
  as they were. Metrics hold "applied" and "skipped", the count so far.
  """
  name = trainable(config)
  with_lora = config.lora is not None

  def train_step(state, reference, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    frozen = state.params["base"]
    scales = _scales(objective, batch)

    def means(sums):
      return objective.with_loss(
        {key: x * scales[objective.weight_of(key)] for key, x in sums.items()}
      )

    def loss(params, micro):
      base, lora = (frozen, params) if with_lora else (params, None)
      dropout_key = key if with_lora else None
      policy, other = _policy_and_reference(
        config, objective, base, lora, reference, micro, dropout_key
      )
      sums, _ = _objective_sums(objective, micro, policy, other)
      return means(sums)["loss"], sums

    def accumulate(grads, micro):
      # Around the backward pass, whose own rules are traced outside of `loss`.
      with precision.matmul_precision(config.dtype):
        grad, sums = jax.grad(loss, has_aux=True)(state.params[name], micro)
      return jax.tree.map(jnp.add, grads, grad), sums

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), state.params[name]
    )
    grads, sums = jax.lax.scan(accumulate, zeros, batch)
    metrics = means({key: jnp.sum(value) for key, value in sums.items()})
    metrics["grad_norm"] = optax.tree.norm(grads)
    apply = guards.finite(metrics["loss"], metrics["grad_norm"])
    updates, opt_state = tx.update(
      {"base": None, "lora": None} | {name: grads},
      state.opt_state,
      state.params,
    )
    updated = optax.apply_updates(state.params[name], updates[name])
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(apply, new, old),
      (updated, opt_state),
      (state.params[name], state.opt_state),
    )
    skipped = state.skipped + (~apply).astype(jnp.int32)
    state = TrainState(
      state.step + 1, state.params | {name: params}, opt_state, skipped
    )
    return state, metrics | {"applied": apply, "skipped": skipped}

  return train_step


def make_eval_step(
  config: gpt_neox.ModelConfig, objective: Objective
) -> Callable[[Tree, Tree | None, batch_lib.Batch], Metrics]:
  """(params, reference, batch) -> sums of the metrics, and their weights.

  "weight" is the number of pairs, or for SFT of completion tokens. "entropy" is
  in nats over all completion tokens; "mean_token_accuracy" counts those, of
  chosen responses alone as in TRL, that are the argmax; "tokens" and
  "chosen_tokens" are their weights, and "desirable" and "undesirable" those of
  labeled responses. `Objective.means` divides sums of many batches by those of
  their weights. A batch may hold fewer items than the objective: sequences
  without tokens do not count.
  """
  with_lora = config.lora is not None

  def eval_step(params, reference, batch):
    micro = jax.tree.map(lambda x: x[0], batch)
    lora = params["lora"] if with_lora else None
    policy, other = _policy_and_reference(
      config, objective, params["base"], lora, reference, micro
    )
    sums, weights = _objective_sums(objective, micro, policy, other)
    return sums | weights | _token_sums(objective, micro, policy)

  return eval_step


def _token_sums(objective, batch, stats) -> Metrics:
  """Sums over completion tokens of entropy and accuracy, and their counts."""
  real, chosen = batch.sequence_ids >= 0, _chosen(objective, batch)
  if batch.desirable is not None:
    # Responses to other prompts only give the reference point.
    real = chosen
  right = chosen & (stats.top == batch.target)
  return {
    "entropy": jnp.sum(jnp.where(real, stats.entropy, 0)),
    "tokens": jnp.sum(real.astype(jnp.float32)),
    "mean_token_accuracy": jnp.sum(right.astype(jnp.float32)),
    "chosen_tokens": jnp.sum(chosen.astype(jnp.float32)),
  }


def _chosen(objective, batch):
  """Which completion tokens are chosen responses': all of examples, [S, C]."""
  real = batch.sequence_ids >= 0
  # The even sequences of pairs.
  return (
    real & (batch.sequence_ids % 2 == 0) if objective.kind == "dpo" else (real)
  )


def _policy_and_reference(
  config, objective, base, lora, reference, batch, dropout_key=None
) -> tuple[logprobs.TokenStats, jax.Array | None]:
  """The policy's statistics, and the reference's log-probs if it has one.

  The latter are the batch's own; or of the base, in one pass with the policy;
  or of the tree `reference`.
  """
  wanted = objective.has_reference
  if wanted and batch.reference is None and lora is not None:
    policy, other = both_token_stats(config, base, lora, batch, dropout_key)
    return policy, other.logps
  policy = token_stats(config, base, lora, batch, dropout_key)
  if not wanted:
    return policy, None
  if batch.reference is not None:
    return policy, batch.reference
  other = token_logps(config, reference, None, batch)
  return policy, jax.lax.stop_gradient(other)


def _model_inputs(batch):
  """Tokens, positions and segments of a micro-batch."""
  segments = attention.Segments(
    batch.segment_ids, batch.part_ids, batch.block_pairs
  )
  return batch.tokens, batch.positions, segments


def _token_keys(key, batch):
  """A dropout key for each token, [B, T]; None without one."""
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
    vocab_tile=config.vocab_tile,
  )


def _scales(objective: Objective, batch: batch_lib.Batch) -> Metrics:
  """One over each of the weights of all micro-batches together."""
  tokens = 1 / jnp.sum(_chosen(objective, batch)).astype(jnp.float32)
  if objective.kind == "sft":
    return {"weight": tokens}
  pairs = jnp.float32(1 / (objective.items * batch.tokens.shape[0]))
  scales = {"weight": pairs, "chosen_tokens": tokens}
  if batch.desirable is not None:
    # Of the only micro-batch, which is full.
    micro = jax.tree.map(lambda x: x[0], batch)
    count = jnp.sum(_desirable(objective, micro))
    scales["desirable"] = 1 / jnp.maximum(count, 1)
    scales["undesirable"] = 1 / jnp.maximum(objective.items - count, 1)
  return scales


def _desirable(objective, batch) -> jax.Array:
  """Which items are desirable, bool [items]."""
  sums, _ = logprobs.sequence_sums(
    batch.desirable, batch.sequence_ids, 2 * objective.items
  )
  return sums[::2] > 0


def _objective_sums(objective, batch, policy, reference):
  """Sums over a micro-batch of the loss and metrics, and their weights.

  `policy` are statistics, and `reference`, if there is one, log-probs of
  tokens, [S, C].
  """
  if objective.kind == "sft":
    sums, lengths = logprobs.sequence_sums(
      policy.logps, batch.sequence_ids, objective.items
    )
    return {"loss": -jnp.sum(sums)}, {"weight": jnp.sum(lengths)}
  pair = _pair(objective, batch, policy, reference)
  values = pair_metrics.metrics(pair, objective.loss)
  for kind, loss in losses.preference_losses(objective.loss, pair).items():
    values[objective.loss.metric(kind)] = loss
  real = (pair.lengths.chosen > 0).astype(jnp.float32)
  sums = {key: jnp.sum(value * real) for key, value in values.items()}
  weights = {"weight": jnp.sum(real)}
  if pair.desirable is not None:
    weights["desirable"] = jnp.sum(real * pair.desirable)
    weights["undesirable"] = jnp.sum(real * ~pair.desirable)
  return sums, weights


def _pair(objective, batch, policy, reference) -> losses.Pair:
  """The pairs of a micro-batch: sequences 2i, chosen, and 2i + 1, rejected."""

  def responses(per_token):
    found = logprobs.sequence_sums(
      per_token, batch.sequence_ids, 2 * objective.items
    )
    return [losses.Responses(*x.reshape(-1, 2).T) for x in found]

  sums, lengths = responses(policy.logps)
  ratios = policy.logps if reference is None else policy.logps - reference
  if objective.loss.ld_alpha != 1:
    where = _index_and_shorter(batch, lengths)
    ratios *= losses.token_weights(objective.loss, *where)
  aligned = None
  if objective.loss.wpo:
    aligned, _ = responses(policy.logps - policy.log_square_sum)
  return losses.Pair(
    policy=sums,
    reference=None if reference is None else responses(reference)[0],
    ratios=responses(ratios)[0],
    lengths=lengths,
    desirable=None if batch.desirable is None else _desirable(objective, batch),
    on_policy=aligned and losses.per_token(aligned, lengths),
  )


def _index_and_shorter(batch, lengths):
  """A token's index in its response, and the pair's lesser length, [S, C]."""
  sequences = 2 * len(lengths.chosen)
  # One extra segment takes the padding.
  ids = jnp.where(batch.sequence_ids < 0, sequences, batch.sequence_ids)
  column = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  # A response is in one shard, its tokens adjacent and in order.
  first = jax.ops.segment_min(
    column.reshape(-1), ids.reshape(-1), sequences + 1
  )
  shorter = jnp.append(jnp.minimum(*lengths), 0)
  return column - first[ids], shorter[ids // 2]

"""Implicit rewards and log-probs of pairs, under TRL's names."""

import jax
import jax.numpy as jnp

from dpo_jax.training import losses

# Rounding error, in nats, of a margin of a thousand float32 log-probs; smaller
# margins are ties.
_ROUNDING = 1e-4


def metrics(
  pair: losses.Pair, settings: losses.LossSettings
) -> dict[str, jax.Array]:
  """Metrics of every item under TRL's names, all [B]: a value to be averaged.

  Those of "chosen" and "rejected" are of pairs; of labeled responses, of the
  desirable and the undesirable ones, and 0 for the others. "kl" is their
  reference point.
  """
  found = _of_pairs(pair, settings)
  if not settings.labeled:
    return found
  point = jnp.broadcast_to(
    losses.reference_point(pair), pair.lengths.chosen.shape
  )
  by_label = {"kl": point}
  for name in ("rewards/{}", "logps/{}", "logps/{}_per_token"):
    value = found[name.format("chosen")]
    by_label[name.format("chosen")] = jnp.where(pair.desirable, value, 0)
    by_label[name.format("rejected")] = jnp.where(pair.desirable, 0, value)
  return by_label


def _of_pairs(
  pair: losses.Pair, settings: losses.LossSettings
) -> dict[str, jax.Array]:
  """Implicit rewards and log-probs of each pair, under TRL's names; all [B].

  The implicit reward is beta * (log pi(y|x) - log pi_ref(y|x)), without a
  reference beta * log pi(y|x), whose mean over tokens it is for losses of
  means; an accuracy is 1 where the chosen one's is greater, a half where they
  are equal but for rounding.

  References:
    Rafailov et al., 2023, Eq. 5 without the partition function, which cancels
    in a pair.
  """
  policy_means = losses.per_token(pair.policy, pair.lengths)
  of_means = any(loss.of_means for _, loss in settings.losses)
  ratios = policy_means if of_means and pair.reference is None else pair.ratios
  ahead = jnp.sign(ratios.margin)
  ahead = jnp.where(jnp.abs(ratios.margin) > _ROUNDING, ahead, 0)
  chosen, rejected = (settings.beta * ratio for ratio in ratios)
  return {
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "rewards/accuracies": (1 + ahead) / 2,
    "logps/chosen": pair.policy.chosen,
    "logps/rejected": pair.policy.rejected,
    "logps/chosen_per_token": policy_means.chosen,
    "logps/rejected_per_token": policy_means.rejected,
  }

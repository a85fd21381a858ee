"""Our losses and their gradients against those of TRL's own trainers.

  pip install "trl>=1.16"
  python -m benchmarks.losses_trl

calls the loss of DPOTrainer, KTOTrainer, CPOTrainer and ORPOTrainer on random
log-probs of tokens, whose responses have random lengths, and ours on the same
numbers, in float64 (TRL's alpha-divergence is of float32). Gradients are those
by each token's log-prob. Prints a line a loss, and exits with 1 if a value or
gradient differs by more than 1e-6 (float32: 1e-5), relative to the largest.
"""

import collections
import contextlib
import importlib.metadata
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from configs import common
from dpo_jax.core import settings as settings_lib
from dpo_jax.training import losses

PAIRS, TOKENS, BETA = 8, 12, 0.3
SMOOTH = {"label_smoothing": 0.1}
ALPHA = {"divergence": "alpha_divergence", "divergence_alpha": 0.4}

# Our settings, TRL's loss types, and what TRL's trainer calls the settings.
DPO_CASES = [
  *(
    ({"kind": kind}, kind, {})
    for kind in (
      "sigmoid",
      "hinge",
      "nca_pair",
      "bco_pair",
      "sppo_hard",
      "apo_zero",
      "apo_down",
      "discopop",
      "aot",
      "aot_unpaired",
      "sft",
    )
  ),
  ({"kind": "ipo", "per_token": True}, "ipo", {}),
  ({"per_token": True}, "sigmoid_norm", {}),
  *(
    ({"kind": kind} | SMOOTH, kind, SMOOTH)
    for kind in (
      "robust",
      "exo_pair",
      "aot",
      "aot_unpaired",
    )
  ),
  (
    {"kind": "0.8*sigmoid+0.2*bco_pair+sft"},
    "sigmoid bco_pair sft",
    {"loss_weights": [0.8, 0.2, 1.0]},
  ),
  ({"ld_alpha": 0.3}, "sigmoid", {"ld_alpha": 0.3}),
  ({"wpo": True}, "sigmoid", {"use_weighting": True}),
  *(
    ({"divergence": name}, "sigmoid", {"f_divergence_type": name})
    for name in ("forward_kl", "js_divergence")
  ),
  (
    ALPHA,
    "sigmoid",
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
  ),
]
CPO_CASES = [
  ({"kind": "cpo"}, {"loss_type": "sigmoid"}),
  ({"kind": "cpo"} | SMOOTH, {"loss_type": "sigmoid"} | SMOOTH),
  ({"kind": "simpo", "gamma": 0.5}, {"loss_type": "simpo", "simpo_gamma": 0.5}),
]


KTO = {"kind": "kto", "undesirable_weight": 1.5}
# Labels of KTO's responses, for which the rejected ones are of other prompts.
DESIRABLE = np.arange(PAIRS) % 3 > 0


class Case:
  """Log-probs of policy and reference by token, chosen above rejected."""

  def __init__(self, seed, dtype):
    rng = np.random.default_rng(seed)
    shape = 2 * PAIRS, TOKENS
    self.policy = -rng.gamma(1.0, 1.0, shape).astype(dtype)
    self.reference = (self.policy + rng.normal(0, 0.4, shape)).astype(dtype)
    self.squares = -rng.gamma(1.0, 0.3, shape).astype(dtype)
    lengths = rng.integers(1, TOKENS + 1, 2 * PAIRS)
    self.mask = np.arange(TOKENS) < lengths[:, None]
    # As TRL has it at padding.
    for logps in (self.policy, self.reference, self.squares):
      logps *= self.mask


def ours(values, case):
  """(loss, gradient by the policy's token log-probs)."""
  defaults = common.loss().to_dict() | {"beta": BETA}
  used = settings_lib.build(losses.LossSettings, defaults | values, "loss")
  mask = jnp.asarray(case.mask, case.policy.dtype)

  def both(tokens):
    return losses.Responses(*jnp.sum(tokens * mask, 1).reshape(2, PAIRS))

  lengths = both(mask)
  shorter = jnp.tile(jnp.minimum(*lengths), 2)[:, None]
  weights = losses.token_weights(used, jnp.arange(TOKENS), shorter)

  def total(policy):
    reference = None if used.reference_free else case.reference
    ratios = policy if reference is None else policy - reference
    pair = losses.Pair(
      both(policy),
      None if reference is None else both(reference),
      both(ratios * weights),
      lengths,
      desirable=jnp.asarray(DESIRABLE),
      on_policy=losses.per_token(both(policy - case.squares), lengths)
      if used.wpo
      else None,
    )
    means = {
      kind: jnp.sum(value) / jnp.sum(lengths.chosen)
      if losses.LOSSES[kind].per_chosen_token
      else jnp.mean(value)
      for kind, value in losses.preference_losses(used, pair).items()
    }
    return sum(weight * means[kind] for kind, weight in used.weights.items())

  return jax.value_and_grad(total)(jnp.asarray(case.policy))


def outputs_of(log_probs, squares=None):
  """What TRL's model returns, of tokens."""
  zeros = torch.zeros_like(log_probs)
  return types.SimpleNamespace(
    log_probs=log_probs,
    log_sum_sq_probs=squares,
    entropy=zeros,
    mean_logits=zeros,
    is_top1=zeros.bool(),
  )


def fakes(policy, reference, mask):
  """A trainer's attributes and inputs, without a model or an accelerator."""
  model = torch.nn.Module()
  model.is_gradient_checkpointing = False
  trainer = types.SimpleNamespace(
    model=model,
    accelerator=types.SimpleNamespace(
      device="cpu",
      gather=lambda x: x,
      gather_for_metrics=lambda x: x,
      unwrap_model=lambda x: x,
    ),
    args=types.SimpleNamespace(
      gradient_checkpointing=False,
      gradient_checkpointing_kwargs=None,
      discopop_tau=0.05,
    ),
    ref_model=lambda **_: outputs_of(reference),
    beta=BETA,
    label_smoothing=0.0,
    ld_alpha=None,
    use_weighting=False,
    f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5,
    precompute_ref_logps=False,
    aux_loss_enabled=False,
    _metrics={"train": collections.defaultdict(list)},
    _total_train_tokens=0,
    _tp_size=1,
  )
  # The first token of a text has no prediction.
  completions = torch.nn.functional.pad(mask, (1, 0)).long()
  inputs = {
    "input_ids": torch.zeros_like(completions),
    "attention_mask": torch.ones_like(completions),
    "completion_mask": completions,
  }
  return trainer, inputs


def of_dpo_trainer(loss_type, options, case):
  """DPOTrainer's loss and its gradient by the policy's token log-probs."""
  tokens = torch.tensor(case.policy, requires_grad=True)
  mask = torch.tensor(case.mask)
  trainer, inputs = fakes(tokens, torch.tensor(case.reference), mask)
  kinds = loss_type.split()
  defaults = {"loss_types": kinds, "loss_weights": [1.0] * len(kinds)}
  vars(trainer).update(defaults | options)
  squares = torch.tensor(case.squares)

  def model(**_):
    return outputs_of(tokens * mask, squares)

  loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
  loss.backward()
  return loss.item(), tokens.grad.numpy()


def of_kto_trainer(case):
  """KTOTrainer's loss, likewise."""
  tokens = torch.tensor(case.policy, requires_grad=True)
  responses, others = (tokens * torch.tensor(case.mask)).chunk(2)
  reference, of_others = torch.tensor(case.reference).chunk(2)
  trainer, inputs = fakes(responses, reference, torch.tensor(case.mask[:PAIRS]))
  vars(trainer).update(
    loss_type="kto",
    calculate_KL=True,
    desirable_weight=1.0,
    undesirable_weight=KTO["undesirable_weight"],
    _compute_kl_logps=lambda model, _: (
      of_others if model is trainer.ref_model else others.detach()
    ).sum(1),
  )
  inputs["label"] = torch.tensor(DESIRABLE)

  def model(**_):
    return outputs_of(responses)

  loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
  loss.backward()
  return loss.item(), tokens.grad.numpy()


def of_policy_trainer(cls, options, case):
  """The preference term of CPOTrainer or ORPOTrainer."""
  tokens = torch.tensor(case.policy, requires_grad=True)
  mask = torch.tensor(case.mask)
  logps = (tokens * mask).sum(1)
  if options.get("loss_type") != "sigmoid":
    logps = logps / mask.sum(1)
  defaults = {"beta": BETA, "alpha": 0.0, "label_smoothing": 0.0}
  trainer = types.SimpleNamespace(
    accelerator=types.SimpleNamespace(device="cpu"), **(defaults | options)
  )
  if cls is CPOTrainer:
    loss = cls.cpo_loss(trainer, *logps.chunk(2))[0].mean()
  else:
    # ORPOTrainer subtracts it from the SFT loss.
    loss = -cls.odds_ratio_loss(trainer, *logps.chunk(2))[0].mean()
  loss.backward()
  return loss.item(), tokens.grad.numpy()


def compared(values, theirs, dtype=np.float64):
  """Prints the largest differences over ten cases; whether they are small."""
  of_value = of_gradient = 0.0
  exact = (
    jax.enable_x64(True) if dtype == np.float64 else (contextlib.nullcontext())
  )
  with exact:
    for seed in range(10):
      case = Case(seed, dtype)
      value, gradient = ours(values, case)
      wanted, slopes = theirs(case)
      of_value = max(of_value, abs(float(value) - wanted) / abs(wanted))
      error = np.abs(np.asarray(gradient) - slopes).max()
      of_gradient = max(of_gradient, error / np.abs(slopes).max())
  name = ", ".join(f"{key}={value}" for key, value in values.items())
  print(f"{name:55} {of_value:8.1e} {of_gradient:8.1e}")
  limit = 1e-6 if dtype == np.float64 else 1e-5
  return max(of_value, of_gradient) < limit


def main() -> int:
  print(f"TRL {importlib.metadata.version('trl')}, relative differences of")
  print(f"{'':55} {'value':>8} {'gradient':>8}")
  good = []
  for values, kind, options in DPO_CASES:
    dtype = np.float32 if values is ALPHA else np.float64
    good.append(
      compared(
        values,
        lambda case, k=kind, o=options: of_dpo_trainer(k, o, case),
        dtype,
      )
    )
  for values, options in CPO_CASES:
    good.append(
      compared(
        values,
        lambda case, o=options: of_policy_trainer(CPOTrainer, o, case),
      )
    )
  good.append(compared(KTO, of_kto_trainer))
  # Its odds are of float32.
  good.append(
    compared(
      {"kind": "orpo"},
      lambda case: of_policy_trainer(ORPOTrainer, {}, case),
      np.float32,
    )
  )
  print(f"{sum(good)} of {len(good)} equal")
  return 0 if all(good) else 1


if __name__ == "__main__":
  sys.exit(main())

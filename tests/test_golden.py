"""Five DPO steps on real rows against a plain PyTorch loop.

Ours packs `[prompt | chosen | rejected]` of several pairs into a row and
accumulates over two micro-batches; the loop below runs every sequence on its
own, padded, in one batch, with torch's own optimizers. Both are float32; what
is left between them is the order of summation.
"""

import contextlib
import dataclasses

import jax
import numpy as np
import peft
import pytest
import sourcing
import tiny
import torch
import transformers

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, tokenization, tokenizer
from dpo_jax.model import gpt_neox, hf
from dpo_jax.training import optimizer as optimizer_lib
from dpo_jax.training import step as step_lib

STEPS, BATCH, BETA = 5, 4, 0.4
# Losses and rewards are sums of some 50 log-probs of about -11 nats each, of
# which float32 keeps seven digits: 1e-4 leaves room for five updates.
TOLERANCE = 1e-4
# The vocabulary of Pythia, so that the ids are the real ones.
CONFIG = gpt_neox.ModelConfig(
  vocab_size=50304,
  width=64,
  layers=2,
  heads=4,
  mlp_width=128,
  rotary_fraction=0.25,
  rotary_base=10000.0,
  norm_eps=1e-5,
  max_positions=128,
)
RMSPROP = optimizer_lib.OptimizerSettings(
  name="rmsprop",
  learning_rate=2e-4,
  schedule="constant",
  warmup_steps=4,
  warmup_ratio=0.0,
  weight_decay=0.0,
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  clip_norm=10.0,
)
ADAMW = dataclasses.replace(
  RMSPROP,
  name="adamw",
  learning_rate=1e-2,
  schedule="cosine",
  warmup_steps=2,
  warmup_ratio=0.0,
  weight_decay=0.1,
  b2=0.999,
  clip_norm=1.0,
)
LORA = gpt_neox.LoraConfig(4, 8.0, 0.0, gpt_neox.TARGETS)
# Metrics of both the torch loop and the step.
REPORTED = (
  "loss",
  "grad_norm",
  "rewards/chosen",
  "rewards/rejected",
  "rewards/margins",
  "rewards/accuracies",
  "logps/chosen",
  "logps/rejected",
  "logps/chosen_per_token",
  "logps/rejected_per_token",
)


@pytest.fixture(scope="module")
def real(shared):
  """The real tokenizer, and the first real pairs by the rule of the paper."""
  words = tokenizer.load(shared / "tokenizer" / "pythia")
  rows = sourcing.harmless(shared, limit=STEPS * BATCH)
  found = tokenization.tokenize(
    words, rows, rules="paper", max_length=48, max_prompt_length=24
  )
  assert len(found.table) == STEPS * BATCH
  return words, list(found.table)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """Random weights, and their export for torch to read."""
  base = tiny.weights(CONFIG)
  directory = tmp_path_factory.mktemp("golden") / "model"
  hf.export(directory, CONFIG, base)
  return base, directory


def groups(pairs):
  return [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]


# --- ours


def ours(config, base, adapters, pairs, pad_id, settings):
  """One dict of metrics for each step."""
  tx = optimizer_lib.make(settings, STEPS, step_lib.trainable(config))
  objective = step_lib.Objective("dpo", tiny.loss(beta=BETA), BATCH // 2)
  # Room for all that two pairs may hold: one shape for all batches.
  one = (packing.Shape(1, 128),)
  how = packing.Packing("shared", 384, 1, 2, False, pad_id, one)
  step = jax.jit(step_lib.make_train_step(config, objective, tx, seed=0))
  state = step_lib.init_state(base, adapters, tx)
  reference = None if config.lora else base
  history = []
  for group in groups(pairs):
    batch, _ = batch_lib.pack(group, how)
    state, metrics = step(state, reference, batch)
    history.append({key: float(value) for key, value in metrics.items()})
  return history


# --- theirs


def torch_logps(network, prompts, responses, pad_id):
  """Summed log-probs of responses after their prompts, [B]."""
  rows = [p + r for p, r in zip(prompts, responses, strict=True)]
  width = max(map(len, rows))
  ids = torch.full((len(rows), width), pad_id)
  seen = torch.zeros((len(rows), width), dtype=torch.long)
  counts = torch.zeros((len(rows), width), dtype=torch.bool)
  for i, row in enumerate(rows):
    ids[i, : len(row)] = torch.tensor(row)
    seen[i, : len(row)] = 1
    counts[i, len(prompts[i]) : len(row)] = True
  logits = network(input_ids=ids, attention_mask=seen).logits[:, :-1]
  logps = torch.log_softmax(logits, dim=-1)
  picked = logps.gather(2, ids[:, 1:, None])[..., 0]
  return (picked * counts[:, 1:]).sum(-1)


def torch_loop(policy, reference, pairs, pad_id, optimizer, scheduler, clip):
  """The textbook loop; `reference` is a context and the model in it."""
  weights = [w for w in policy.parameters() if w.requires_grad]
  history = []
  for group in groups(pairs):
    prompts = [pair.prompt for pair in group] * 2
    responses = [pair.chosen for pair in group] + [p.rejected for p in group]
    lengths = torch.tensor([len(x) for x in responses])
    chosen, rejected = torch_logps(policy, prompts, responses, pad_id).split(
      BATCH
    )
    context, frozen = reference()
    with torch.no_grad(), context:
      ref_chosen, ref_rejected = torch_logps(
        frozen, prompts, responses, pad_id
      ).split(BATCH)
    good, bad = BETA * (chosen - ref_chosen), BETA * (rejected - ref_rejected)
    loss = -torch.nn.functional.logsigmoid(good - bad).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(weights, clip)
    optimizer.step()
    scheduler.step()
    history.append(
      {
        "loss": loss,
        "grad_norm": norm,
        "rewards/chosen": good.mean(),
        "rewards/rejected": bad.mean(),
        "rewards/margins": (good - bad).mean(),
        "rewards/accuracies": 0.5 * (1 + torch.sign(good - bad)).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "logps/chosen_per_token": (chosen / lengths[:BATCH]).mean(),
        "logps/rejected_per_token": (rejected / lengths[BATCH:]).mean(),
      }
    )
  return [{k: v.item() for k, v in row.items()} for row in history]


def load_torch(directory):
  return transformers.GPTNeoXForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  ).eval()


# --- the comparison


def assert_equal(found, wanted):
  for a, b in zip(found, wanted, strict=True):
    assert a.keys() - {"applied", "skipped"} == set(REPORTED)
    for key in REPORTED:
      # Relative for log-probs and norms beyond 1, absolute for the rest.
      assert a[key] == pytest.approx(b[key], rel=TOLERANCE, abs=TOLERANCE), key
  assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  # The test says nothing unless training has gone somewhere.
  assert max(abs(row["loss"] - np.log(2)) for row in found) > 0.05


def test_full_fine_tuning_with_rmsprop_equals_torch(real, exported):
  words, pairs = real
  base, directory = exported
  found = ours(CONFIG, base, {}, pairs, words.pad_id, RMSPROP)
  policy, reference = load_torch(directory), load_torch(directory)
  optimizer = torch.optim.RMSprop(
    policy.parameters(), lr=RMSPROP.learning_rate, alpha=0.99, eps=1e-8
  )
  warm = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min(1.0, (step + 1) / RMSPROP.warmup_steps)
  )
  wanted = torch_loop(
    policy,
    lambda: (contextlib.nullcontext(), reference),
    pairs,
    words.pad_id,
    optimizer,
    warm,
    RMSPROP.clip_norm,
  )
  assert_equal(found, wanted)
  # Clipping took part.
  assert max(row["grad_norm"] for row in found) > RMSPROP.clip_norm


@pytest.mark.filterwarnings(
  "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
def test_lora_with_adamw_equals_torch_and_peft(real, exported, tmp_path):
  words, pairs = real
  base, directory = exported
  config = dataclasses.replace(CONFIG, lora=LORA)
  adapters = gpt_neox.init_lora(config, jax.random.key(3))
  found = ours(config, base, adapters, pairs, words.pad_id, ADAMW)
  hf.export_adapter(tmp_path / "adapter", config, adapters, str(directory))
  policy = peft.PeftModel.from_pretrained(
    load_torch(directory), tmp_path / "adapter", is_trainable=True
  )
  trained = [w for w in policy.parameters() if w.requires_grad]
  assert sum(w.numel() for w in trained) == sum(
    leaf.size for leaf in jax.tree.leaves(adapters)
  )
  optimizer = torch.optim.AdamW(
    trained,
    lr=ADAMW.learning_rate,
    betas=(ADAMW.b1, ADAMW.b2),
    eps=ADAMW.eps,
    weight_decay=ADAMW.weight_decay,
  )

  def rate(step):
    if step < ADAMW.warmup_steps:
      return (step + 1) / ADAMW.warmup_steps
    share = (step - ADAMW.warmup_steps) / (STEPS - ADAMW.warmup_steps)
    return 0.5 * (1 + np.cos(np.pi * share))

  scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
  wanted = torch_loop(
    policy,
    lambda: (policy.disable_adapter(), policy),
    pairs,
    words.pad_id,
    optimizer,
    scheduler,
    ADAMW.clip_norm,
  )
  assert_equal(found, wanted)
  assert max(row["grad_norm"] for row in found) > ADAMW.clip_norm

"""TRL's side of dpo_step: DPOTrainer on token ids that dpo_step prepared.

Imports nothing of dpo_jax, and is run by the Python of an environment that has
TRL; 0.24 and 1.16 were tried. The trainer's own loop, model, loss and optimizer
are timed; only two things of it are replaced. Its preparation of texts: the ids
are those that the other side trains on. Its sampler: batches come in the order
of the other side's, each sorted by length, which spares padding wherever a
batch is several micro-batches.

With --search it makes only the first updates, for dpo_step to choose settings
by their speed, and writes what TRL refuses instead of failing.
"""

import argparse
import importlib.metadata
import json
import pathlib
import tempfile
import time

import datasets
import peft
import safetensors.torch
import torch
import transformers
import trl

# TRL 0.x and 1.x name the columns of token ids differently.
OLD = hasattr(trl.DPOTrainer, "tokenize_row")
NAMES = [
  f"{part}_input_ids" if OLD else f"{part}_ids"
  for part in ("prompt", "chosen", "rejected")
]
# The projections of a GPT-NeoX block.
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
# With --search: the first is warm-up.
SEARCHED = 2


class Trainer(trl.DPOTrainer):
  def _prepare_dataset(self, dataset, *unused):
    return dataset

  def _get_train_sampler(self, *unused):
    return torch.utils.data.SequentialSampler(self.train_dataset)


class Clock(transformers.TrainerCallback):
  """Seconds, loss and norm of the gradient of every update."""

  def __init__(self):
    self.seconds, self.losses, self.norms = [], [], []

  def on_step_begin(self, *unused, **named):
    self.started = time.perf_counter()

  def on_step_end(self, *unused, **named):
    self.seconds.append(time.perf_counter() - self.started)

  def on_log(self, arguments, state, control, logs=None, **named):
    if "loss" in logs:
      self.losses.append(logs["loss"])
      self.norms.append(float(logs["grad_norm"]))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--case", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--threads", type=int, required=True)
  parser.add_argument("--micro_batch", type=int, default=4)
  parser.add_argument(
    "--attention",
    choices=("sdpa", "eager", "flash_attention_2"),
    default="sdpa",
  )
  parser.add_argument("--padding_free", action="store_true")
  # TRL 0.x only; 1.x has no such option.
  parser.add_argument("--logits_to_keep", action="store_true")
  parser.add_argument("--search", action="store_true")
  # On a GPU base weights and blocks are bfloat16, adapters float32.
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  flags = parser.parse_args()
  torch.set_num_threads(flags.threads)
  case = json.loads((flags.case / "case.json").read_text())
  found = search(case, flags) if flags.search else train(case, flags)
  versions = {
    name: importlib.metadata.version(name)
    for name in ("trl", "transformers", "torch", "peft")
  }
  flags.output.write_text(json.dumps(found | {"versions": versions}))


def train(case, flags):
  clock = Clock()
  trainer = make(case, flags, clock)
  adapters = safetensors.torch.load_file(
    flags.case / "adapter" / "adapter_model.safetensors"
  )
  left = peft.set_peft_model_state_dict(trainer.model, adapters)
  if left.unexpected_keys:
    raise ValueError(f"unknown adapter weights: {left.unexpected_keys}")
  trainer.train()
  return {
    "seconds": clock.seconds,
    "losses": clock.losses,
    "grad_norms": clock.norms,
  }


def search(case, flags):
  """The first updates, or why these settings are refused."""
  try:
    return train(case | {"steps": case["steps"][:SEARCHED]}, flags)
  except (ValueError, RuntimeError, NotImplementedError) as error:
    return {"refused": str(error)[:200]}


def make(case, flags, clock):
  rows = [
    dict(zip(NAMES, pair, strict=True))
    for step in case["steps"]
    for pair in sorted(step, key=lambda parts: -max(map(len, parts)))
  ]
  settings = case["settings"]
  size = len(case["steps"][0])
  old = {}
  if OLD:
    old["max_prompt_length"] = None
    old["use_logits_to_keep"] = flags.logits_to_keep
  config = trl.DPOConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=flags.micro_batch,
    gradient_accumulation_steps=size // flags.micro_batch,
    gradient_checkpointing=False,
    precompute_ref_log_probs=True,
    padding_free=flags.padding_free,
    max_length=case["max_length"],
    beta=settings["beta"],
    learning_rate=settings["learning_rate"],
    lr_scheduler_type="constant",
    warmup_steps=0,
    weight_decay=settings["weight_decay"],
    adam_beta1=settings["b1"],
    adam_beta2=settings["b2"],
    adam_epsilon=settings["eps"],
    max_grad_norm=settings["clip_norm"],
    max_steps=len(case["steps"]),
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=flags.device == "cpu",
    bf16=flags.device == "gpu",
    disable_tqdm=True,
    **old,
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    case["model"],
    attn_implementation=flags.attention,
    dtype=torch.float32 if flags.device == "cpu" else torch.bfloat16,
  )
  return Trainer(
    model=model,
    args=config,
    train_dataset=datasets.Dataset.from_list(rows),
    processing_class=transformers.AutoTokenizer.from_pretrained(case["model"]),
    peft_config=peft.LoraConfig(
      r=settings["rank"],
      lora_alpha=settings["alpha"],
      lora_dropout=0.0,
      target_modules=TARGETS,
      task_type="CAUSAL_LM",
    ),
    callbacks=[clock],
  )


if __name__ == "__main__":
  main()

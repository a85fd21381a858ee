"""Supervised fine-tuning of a Pythia on HH's chosen responses.

Command:
  python train.py --config=configs/sft.py:pythia-2.8b --workdir=runs/sft

Variants: `pythia-SIZE` is the recipe of the paper's official code (all weights,
RMSprop, batches of 64 for one epoch); `pythia-SIZE-lora` that of the
dpo-replication system (LoRA, AdamW, cosine). SIZE is a key of
configs/models.py.

Made for: by arithmetic, 2.8B with all weights needs about 45 GB before
activations (weights, gradient, its accumulator and RMSprop state at 4 bytes
each; not measured), so two 40 GB devices with --config.mesh.fsdp=2 or
more; with LoRA, one. Hours: not measured. The paper's authors report 1.5
hours on four A100-80GB.
Expect: win rates against chosen of about 0.37 to 0.43 at T = 0.7 to 1.0, read
off the paper's Figure 3 (Rafailov et al., 2023).
"""

from configs import common, models


def get_config(variant: str = "pythia-2.8b"):
  c = common.training()
  size, lora = parse(variant)
  c.objective = "sft"
  c.tokenizer = c.model.path = f"EleutherAI/pythia-{size}"
  if lora:
    lora_recipe(c)
    c.lora.dropout = 0.1
    c.optimizer.learning_rate = 2e-5
    c.batch_size = 64
    c.microbatches = 8
  return c


def parse(variant: str) -> tuple[str, bool]:
  """ "pythia-2.8b-lora" as ("2.8b", True)."""
  size = variant.removeprefix("pythia-").removesuffix("-lora")
  models.pythia(size)
  return size, variant.endswith("-lora")


def lora_recipe(c) -> None:
  """The fields that SFT and DPO of the dpo-replication system share."""
  c.lora.rank = 16
  c.lora.alpha = 32.0
  c.optimizer.name = "adamw"
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup_steps = 100
  c.optimizer.weight_decay = 0.01
  c.optimizer.b2 = 0.999
  c.optimizer.clip_norm = 1.0
  c.data.sources.hh.subsets = ("harmless-base",)
  c.data.tokenization = "dpo-replication"
  c.data.max_prompt_length = 358
  c.export_adapters = True
  c.checkpoint_every = 100

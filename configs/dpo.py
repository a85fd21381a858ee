"""DPO of a fine-tuned Pythia on HH's pairs.

Command:
  python train.py --config=configs/dpo.py:pythia-2.8b --workdir=runs/dpo \\
    --config.model.path=runs/sft/export

Variants: `pythia-SIZE` is the recipe of the paper's official code (all
weights, RMSprop at 5e-7, beta 0.1, batches of 64 pairs for one epoch);
`pythia-SIZE-lora` that of the dpo-replication system (LoRA on all four
projections, AdamW, cosine, beta 0.2, batches of 16). SIZE is a key of
configs/models.py.

Made for: by arithmetic, 2.8B with all weights needs about 56 GB before
activations (policy, reference, gradient, its accumulator and RMSprop state at 4
bytes each; not measured), so two 40 GB devices with
--config.mesh.fsdp=2 or more; with LoRA the reference is the base with its
adapters off, and one device suffices. Hours: not measured. The paper's
authors report 2.75 hours on four A100-80GB.
Expect: a win rate against chosen of about 0.60 at T = 0.7 and 0.63 at T = 1.0
with all four subsets (Rafailov et al., 2023, Figure 3); 0.42 to 0.46 at
T = 0.75 to 1.0 for the LoRA recipe on harmless-base (that system's own
verdicts, recounted).
"""

from configs import common, sft


def get_config(variant: str = "pythia-2.8b"):
  c = common.training()
  size, lora = sft.parse(variant)
  c.objective = "dpo"
  c.tokenizer = f"EleutherAI/pythia-{size}"
  c.model.path = "runs/sft/export"
  c.data.layout = "shared"
  c.loss.beta = 0.1
  if lora:
    sft.lora_recipe(c)
    # TRL's DPOTrainer turns every dropout off, PEFT's too.
    c.lora.dropout = 0.0
    c.loss.beta = 0.2
    c.optimizer.learning_rate = 1e-5
    c.batch_size = 16
    c.microbatches = 4
    if size in ("14m", "31m", "70m"):
      for_cpu(c)
  return c


def for_cpu(c) -> None:
  """The fastest settings on a CPU; see benchmarks/dpo_step.md."""
  c.model.dtype = "float32"
  c.model.attention = "blocks"
  # Less than 3% slower than "none", in half the temporary memory.
  c.model.remat = "save_projections"
  # All tokens of a batch by a 48th of Pythia's vocabulary, so all tiles are
  # full.
  c.model.logit_chunk = 4096
  c.model.vocab_tile = 1048
  c.microbatches = 1
  # Each compiles in seconds.
  c.data.shapes = 6
  c.precompute_reference = True

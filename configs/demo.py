"""The whole pipeline in minutes, offline, on synthetic pairs of known reward.

Command:
  python -m dpo_jax.replicate --config=configs/demo.py --workdir=runs/demo

A GPT-NeoX of 2.9 million weights is pretrained on text of a synthetic world
(base), fine-tuned on chosen responses (SFT), and trained on preference pairs
with adapters (DPO). Responses to unseen prompts are judged by the true reward.

Variants: none is the demo; `tiny` has every size small, to see in a minute or
two that the pipeline runs; its numbers mean nothing.

Made for: 2 CPU cores, about 5 minutes. Expect: base below SFT below DPO at
T = 0.75 and 1.0, with 95% intervals that do not overlap; README quotes a run.
"""

from ml_collections import config_dict

from configs import common, data, judge, models, sample

_VOCABULARY = 1024


def get_config(variant: str = ""):
  if variant not in ("", "tiny"):
    raise ValueError(f"variant {variant!r} must be '' or 'tiny'")
  c = config_dict.ConfigDict()
  # Substituted for {NAME} in any string below; {workdir} is the working
  # directory.
  c.paths = config_dict.ConfigDict(
    {
      # Directory of the pairs.
      "world": "{workdir}/world",
      # Directory of the tokenizer.
      "tokenizer": "{workdir}/tokenizer",
    }
  )
  # The synthetic pairs, or None.
  c.world = world()
  # The tokenizer to train, or None.
  c.vocabulary = vocabulary()
  # The randomly initialized model, or None.
  c.init = init()
  # Training of the base model, or None.
  c.pretrain = pretrain()
  c.sft = sft()
  c.dpo = dpo()
  c.sample = sampling()
  c.judge = judge.get_config("oracle")
  c.report = report("DPO on the synthetic world", ("pretrain", "sft", "dpo"))
  if variant == "tiny":
    shrink(c)
  return c


def world() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # Of all its texts and labels.
  c.seed = 0
  # Pairs of mixed responses; the base model learns both of each.
  c.pretrain = 4400
  # Preference pairs for SFT (chosen) and DPO.
  c.train = 4096
  # Pairs whose prompts are in neither of the two others.
  c.test = 768
  # Labels are drawn with P(chosen) = sigmoid(scale * difference in reward).
  c.scale = 1.0
  return c


def vocabulary() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # Pairs whose texts the tokenizer is trained on.
  c.texts = "{world}/pretrain.jsonl"
  # Tokens at most.
  c.size = _VOCABULARY
  # Output directory.
  c.directory = "{tokenizer}"
  return c


def init() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  c.architecture = architecture()
  # Of the random weights.
  c.seed = 0
  # Saved with the weights.
  c.tokenizer = "{tokenizer}"
  # Output directory of both.
  c.directory = "{workdir}/init"
  return c


def architecture() -> config_dict.ConfigDict:
  """2.9 million weights; fields as in configs/models.py."""
  c = models.pythia("14m")
  c.vocab_size = _VOCABULARY
  c.width = 256
  c.layers = 3
  c.heads = 4
  c.mlp_width = 1024
  c.max_positions = 256
  return c


def training(stage: str, model: str) -> config_dict.ConfigDict:
  """Fields that the three trainings have in common."""
  c = common.training()
  c.tokenizer = "{tokenizer}"
  c.model.path = model
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.model.logit_chunk = 128
  c.data.use = ("world",)
  c.data.sources = world_source(f"{{world}}/{stage}.jsonl")
  c.data.max_eval = 256
  c.data.allow_leakage = False
  c.data.max_length = 128
  c.data.max_prompt_length = 96
  c.data.token_cache = ""
  # In so short a run a compilation costs more than empty rows.
  c.data.shapes = 2
  c.data.row_length = 128
  c.optimizer.name = "adamw"
  c.optimizer.schedule = "cosine"
  c.optimizer.b2 = 0.99
  c.optimizer.clip_norm = 1.0
  c.eval_every = 0
  c.eval_batch_size = 128
  c.checkpoint_every = 0
  return c


def world_source(path: str) -> config_dict.ConfigDict:
  """The world's pairs as the only source."""
  return config_dict.ConfigDict(
    {"world": data.pairs(path, "{world}/test.jsonl")}
  )


def pretrain() -> config_dict.ConfigDict:
  c = training("pretrain", "{workdir}/init")
  c.data.responses = "both"
  c.data.loss_on_prompt = True
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 20
  c.optimizer.weight_decay = 0.1
  c.batch_size = 8
  c.eval_every = 275
  c.checkpoint_every = 550
  return c


def sft() -> config_dict.ConfigDict:
  c = training("train", "{workdir}/pretrain/export")
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 10
  c.batch_size = 16
  c.eval_every = 128
  return c


def dpo() -> config_dict.ConfigDict:
  c = training("train", "{workdir}/sft/export")
  c.objective = "dpo"
  c.lora.rank = 16
  c.lora.alpha = 32.0
  c.lora.dropout = 0.0
  c.data.layout = "shared"
  c.data.row_length = 192
  c.loss.beta = 0.2
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = 10
  c.batch_size = 32
  c.eval_every = 43
  c.checkpoint_every = 43
  c.export_adapters = True
  return c


def sampling() -> config_dict.ConfigDict:
  c = sample.sampling()
  c.policies.base = sample.policy(
    "base", "{workdir}/pretrain/export", sample.FINAL
  )
  c.policies.sft = sample.policy("sft", "{workdir}/sft/export", sample.FINAL)
  c.policies.dpo = sample.policy("dpo", "{workdir}/dpo/export", sample.FINAL)
  c.policies.checkpoints = sample.checkpoints(
    "dpo", "{workdir}/sft/export", "{workdir}/dpo/adapters", sample.CHECKPOINTS
  )
  c.data.source = world_source("{world}/test.jsonl").world
  c.tokenizer = "{tokenizer}"
  c.max_new_tokens = 64
  c.max_prompt_tokens = 96
  c.batch_size = 256
  c.length_multiple = 48
  c.span = 0
  c.dtype = "float32"
  return c


def report(title: str, runs: tuple[str, ...]) -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # Heading of the report.
  c.title = title
  # Training runs whose curves and data counts are shown, in this order.
  c.runs = runs
  # Of the bootstrap and the choice of examples.
  c.seed = 0
  # Bootstrap resamples of an interval.
  c.resamples = 2000
  # Of every interval.
  c.confidence = 0.95
  # Prompts that are shown with every final model's response.
  c.examples = 5
  # Directory of the verdicts; "verdicts-NAME" for a second criterion, with its
  # report in report-NAME.
  c.verdicts = "verdicts"
  # A text against itself is flagged if a fair judge's rate would differ from
  # 50% as much with this probability or less.
  c.aa_alpha = 0.01
  # The first-slot rate is flagged above this and below 1 less it, if its
  # interval excludes 50%.
  c.first_slot_limit = 0.65
  # Least win rate of the prompt's own response against another prompt's.
  c.gold_floor = 0.8
  # Exit with an error after writing a flagged report.
  c.strict = False
  return c


def shrink(c: config_dict.ConfigDict) -> None:
  """Reduces every size for a test."""
  c.world.pretrain, c.world.train, c.world.test = 64, 48, 12
  c.init.architecture.width = 32
  c.init.architecture.mlp_width = 64
  c.init.architecture.layers = 2
  for stage in (c.pretrain, c.sft, c.dpo):
    stage.batch_size = 16
    stage.eval_batch_size = 16
    stage.eval_every = 2
    stage.checkpoint_every = 2
    stage.max_steps = 3
    stage.data.shapes = 1
    stage.lora.rank = min(stage.lora.rank, 4)
  c.sample.batch_size = 16
  c.sample.max_new_tokens = 8
  c.report.resamples = 200
  c.report.examples = 2

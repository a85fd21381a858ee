"""The whole pipeline on Anthropic HH with Pythia.

Command:
  python -m dpo_jax.replicate --config=configs/hh.py:pythia-2.8b-lora \\
    --workdir=runs/hh

Variants: `pythia-SIZE` and `pythia-SIZE-lora` train by the recipes of
configs/sft.py and configs/dpo.py, sample responses to HH's test prompts at four
temperatures (LoRA: every DPO checkpoint at two) and use the judge of
configs/judge.py:openai, which needs OPENAI_API_KEY. `smoke` is a smoke test on
any machine: a few steps of a random Pythia-14m on real rows with the real
tokenizer. Its judge prefers the longer text, and its numbers mean nothing.

Local copies need three flags:
  --config.paths.data=DIR --config.paths.tokenizer=DIR --config.paths.model=DIR

Made for: see configs/dpo.py. Hours: not measured. Expect: see
configs/dpo.py; SFT at 0.37 to 0.43 and the base at 0.21 to 0.25 at T = 0.7 to
1.0, read off Figure 3 of Rafailov et al., 2023.
"""

from ml_collections import config_dict

from configs import demo, dpo, judge, models, sample, sft


def get_config(variant: str = "pythia-2.8b"):
  smoke = variant == "smoke"
  recipe = "pythia-14m-lora" if smoke else variant
  size, lora = sft.parse(recipe)
  hub_model = f"EleutherAI/pythia-{size}"
  c = config_dict.ConfigDict()
  # Inputs of several stages. {NAME} in any string below is replaced by one, and
  # {workdir} by the working directory.
  c.paths = config_dict.ConfigDict(
    {
      # Dataset: a directory in its own layout, or a hub id.
      "data": "Anthropic/hh-rlhf",
      # Directory with tokenizer.json, or a model id on the hub.
      "tokenizer": hub_model,
      # Base model.
      "model": "{workdir}/init" if smoke else hub_model,
    }
  )
  # No synthetic world.
  c.world = None
  # The published tokenizer.
  c.vocabulary = None
  # A random base, for `smoke` only.
  c.init = random_model(size) if smoke else None
  # The published base.
  c.pretrain = None
  c.sft = stage(sft.get_config(recipe), "{model}")
  c.dpo = stage(dpo.get_config(recipe), "{workdir}/sft/export")
  c.sample = sampling(lora)
  c.judge = judge.get_config("length" if smoke else "openai")
  c.report = demo.report(f"DPO on HH, {variant}", ("sft", "dpo"))
  if smoke:
    shrink(c)
  return c


def stage(c, model: str):
  """A training recipe that reads from `paths`."""
  c.model.path = model
  c.tokenizer = "{tokenizer}"
  c.data.sources.hh.train_path = c.data.sources.hh.eval_path = "{data}"
  return c


def random_model(size: str) -> config_dict.ConfigDict:
  c = demo.init()
  c.architecture = models.pythia(size)
  return c


def sampling(lora: bool) -> config_dict.ConfigDict:
  c = sample.get_config("dpo-replication" if lora else "paper")
  c.tokenizer = "{tokenizer}"
  c.data.source.train_path = c.data.source.eval_path = "{data}"
  c.policies = config_dict.ConfigDict()
  c.policies.base = sample.policy("base", "{model}", sample.FINAL)
  c.policies.sft = sample.policy("sft", "{workdir}/sft/export", sample.FINAL)
  c.policies.dpo = sample.policy("dpo", "{workdir}/dpo/export", sample.FINAL)
  if lora:
    c.policies.checkpoints = sample.checkpoints(
      "dpo",
      "{workdir}/sft/export",
      "{workdir}/dpo/adapters",
      sample.CHECKPOINTS,
    )
  return c


def shrink(c: config_dict.ConfigDict) -> None:
  """Makes the run small enough for any machine."""
  for stage in (c.sft, c.dpo):
    stage.model.dtype = "float32"
    stage.data.max_train, stage.data.max_eval = 64, 8
    stage.data.max_length, stage.data.max_prompt_length = 128, 64
    stage.data.row_length = 256
    stage.batch_size, stage.microbatches, stage.eval_batch_size = 8, 2, 8
    stage.max_steps = 2
    stage.data.shapes = 1
    stage.eval_every = stage.checkpoint_every = 1
  c.sample.data.limit = 6
  c.sample.batch_size = 8
  c.sample.max_new_tokens = 8
  c.sample.max_prompt_tokens = 128
  c.sample.length_multiple = 128
  c.sample.dtype = "float32"
  for policy in c.sample.policies.values():
    policy.temperatures = policy.temperatures[-1:]
  c.report.resamples = 200

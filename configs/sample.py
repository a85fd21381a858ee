"""Responses of base, SFT and DPO to HH test prompts, at several temperatures.

Commands:
  python sample.py --config=configs/sample.py:paper --workdir=runs/paper
  python sample.py --config=configs/sample.py:dpo-replication \\
    --workdir=runs/dpo-replication \\
    --config.policies.dpo.adapter=runs/dpo/adapters/step-000300

Variants: `paper` samples at plain temperature on the single-turn test prompts
of all four subsets, as in Figure 3 of Rafailov et al., 2023; `dpo-replication`
is the recipe of the dpo-replication system: top_p 0.9, top_k 50, 256 new
tokens, the first 150 rows of harmless-base.

Both expect the exports of train.py in runs/sft and runs/dpo: runs/sft/export is
a model directory, runs/dpo/adapters/step-000300 and its like hold adapters for
it. `paper` takes the merged DPO model, runs/dpo/export; `dpo-replication` takes
the SFT model with a DPO adapter. Checkpoints are sampled with
`checkpoints(...)`, as in both variants.

Policies of one base are sampled together: its weights are read once a step for
all of their adapters. `best-of-n` samples 16 responses of the DPO model to each
prompt, from one prefill; another N is `--config.samples_per_prompt=N`, for any
variant.

Made for: one accelerator of 40 GB or more: Pythia-2.8B in bfloat16 is 5.6 GB,
and the cache of 64 rows of 512 tokens is 11 GB. Hours: not measured.
Expect: a row for every prompt, temperature and model. Expected win rates are in
configs/dpo.py.
"""

from ml_collections import config_dict

from configs import common, data

FINAL = (0.25, 0.5, 0.75, 1.0)
CHECKPOINTS = (0.7, 1.0)


def get_config(variant: str = "paper"):
  if variant == "best-of-n":
    return best_of_n()
  c = sampling()
  base, sft = "EleutherAI/pythia-2.8b", "runs/sft/export"
  c.tokenizer = base
  c.policies.base = policy("base", base, FINAL)
  c.policies.sft = policy("sft", sft, FINAL)
  c.policies.checkpoints = checkpoints(
    "dpo", sft, "runs/dpo/adapters", CHECKPOINTS
  )
  if variant == "paper":
    c.policies.dpo = policy("dpo", "runs/dpo/export", FINAL)
    c.data.filters.single_turn = True
  elif variant == "dpo-replication":
    c.policies.dpo = policy("dpo", sft, FINAL)
    c.policies.dpo.adapter = "runs/dpo/adapters/step-000300"
    c.top_k, c.top_p, c.max_new_tokens = 50, 0.9, 256
    c.max_prompt_tokens = 358
    c.data.source.subsets = ("harmless-base",)
    c.data.limit = 150
  else:
    raise ValueError(
      f"variant {variant!r} must be 'paper', 'dpo-replication' or 'best-of-n'"
    )
  return c


def best_of_n() -> config_dict.ConfigDict:
  """Several responses to each prompt, for ranking."""
  c = sampling()
  c.policies.dpo = policy("dpo", "runs/dpo/export", (1.0,))
  c.samples_per_prompt = 16
  c.data.filters.single_turn = True
  return c


def sampling() -> config_dict.ConfigDict:
  """All fields of a sampling run; `policies` is to be filled."""
  c = config_dict.ConfigDict()
  # The models to sample from: see `policy`. The keys are only handles.
  c.policies = config_dict.ConfigDict()
  c.data = prompts()
  # Directory with tokenizer.json, or the id of a model on the hub.
  c.tokenizer = "EleutherAI/pythia-2.8b"
  # Draw among the k likeliest tokens; 0 is off.
  c.top_k = 0
  # Draw among the likeliest tokens that together reach this probability; 1.0
  # is off. Applied after temperature and top_k.
  c.top_p = 1.0
  # Most tokens of a response, EOS included.
  c.max_new_tokens = 256
  # A longer prompt keeps this many of its last tokens.
  c.max_prompt_tokens = 256
  # Responses to each prompt at each temperature, by sample ids 0, 1, ...
  c.samples_per_prompt = 1
  # With the prompt's id and the sample id, decides all noise.
  c.seed = 0
  # Responses decoded together; 0 takes as many as the cache's memory holds, at
  # most 512 a device. More is faster while memory lasts; it changes no response
  # (but for ties within rounding).
  c.batch_size = 0
  # Prompts are padded to multiples of this; each length is compiled once, so
  # more means fewer compilations and more padding.
  c.length_multiple = 64
  # Prompt tokens of a prefill batch, about.
  c.prefill_tokens = 4096
  # The KV cache grows and shrinks with the longest row by this many slots; each
  # size is compiled once. 0 keeps it whole, so that a row's roundings do not
  # depend on its neighbors.
  c.span = 128
  # Dtype of keys and values: "model", as dtype says, "float32",
  # "bfloat16" or "int8". int8 halves bfloat16's memory and adds some rounding.
  c.cache = "model"
  # GiB for them on each device, where the device does not tell how much is free
  # (a CPU does not). Where it does, they take 60% of that.
  c.cache_gib = 4.0
  # Merge each adapter into a copy of the base, and sample one after another.
  # False keeps adapters separate and samples those of one base together;
  # bfloat16 would round away a part of what a merged adapter adds.
  c.merge_adapters = False
  # What weights are kept in and blocks compute in: "float32" or "bfloat16".
  c.dtype = "bfloat16"
  c.mesh = common.mesh()
  # With several processes: "process" gives each a mesh of its own devices,
  # which hold all weights, and a share of the prompts; "all" lays one mesh over
  # the devices of all, for models that are too large for those of one.
  c.mesh_over = "process"
  return c


def prompts() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # Its held-out prompts are sampled; see configs/data.py.
  c.source = data.hh()
  c.filters = data.filters()
  # Keep the first so many rows; 0 keeps all.
  c.limit = 0
  return c


def policy(
  name: str, path: str, temperatures: tuple[float, ...]
) -> config_dict.ConfigDict:
  """A model; 0 among its temperatures is greedy."""
  c = config_dict.ConfigDict()
  # What its rows and its file, responses/NAME.jsonl, are called. The report
  # knows base, sft and dpo.
  c.name = name
  # A model directory in Hugging Face form, or a hub id: user/name, or
  # user/name@revision.
  c.path = path
  # A PEFT adapter directory for that model, or a hub id; "" for none.
  c.adapter = ""
  # A directory of adapter directories step-000050, ..., or a hub id with such
  # branches: each is sampled into responses/NAME-step-000050.jsonl; "" for
  # none.
  c.steps_of = ""
  # Every prompt is sampled at each; 0 is greedy.
  c.temperatures = temperatures
  return c


def checkpoints(
  name: str, path: str, steps_of: str, temperatures: tuple[float, ...]
) -> config_dict.ConfigDict:
  """Every checkpoint of a LoRA run, as policies of their steps."""
  c = policy(name, path, temperatures)
  c.steps_of = steps_of
  return c

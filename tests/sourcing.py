"""Settings of a source with every filter off, and rows to write."""

import json

from dpo_jax.data import sources

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PROMPT = f"{HUMAN} What is a pen?{ASSISTANT}"
GOOD = {"chosen": PROMPT + " A tool.", "rejected": PROMPT + " No."}


def source(path, **changes):
  fields = {
    "kind": "pairs",
    "train_path": str(path),
    "train_split": "train",
    "eval_path": str(path),
    "eval_split": "test",
    "held_out": 0.0,
    "subsets": (),
    "weight": 1.0,
    "streaming": False,
    "min_score_ratio": 1.0,
    "max_pairs_per_prompt": 0,
  }
  return sources.SourceSettings(**fields | changes)


def filters(**changes):
  fields = {
    "single_turn": False,
    "max_turns": 0,
    "min_response_chars": 0,
    "max_response_chars": 0,
    "max_prompt_chars": 0,
    "drop_repeats": False,
    "skip_bad": 0,
  }
  return sources.FilterSettings(**fields | changes)


def load(path, *, side="train", limit=0, filtered=None, **changes):
  """Loads `path`; `filtered` changes filters, other names the source."""
  settings = source(path, **changes)
  return sources.load(settings, side, filters(**filtered or {}), limit)


def harmless(shared, side="train", limit=0):
  """Real rows of HH's harmless-base."""
  directory = shared / "data" / "hh-rlhf"
  subsets = ("harmless-base",)
  return load(
    directory, kind="hh", side=side, subsets=subsets, limit=limit
  ).rows


def line(row, **options):
  return json.dumps(row, **options).encode() + b"\n"


def apart(prompt, chosen, rejected):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def texts(loaded):
  return [(row.prompt, row.chosen, row.rejected) for row in loaded.rows]

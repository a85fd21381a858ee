"""Our ids of real pairs against those that TRL's own DPOTrainer makes of them.

  pip install "trl>=1.15"
  python benchmarks/trl_tokens.py --tokenizer=EleutherAI/pythia-2.8b \
    --data=hh-rlhf/harmless-base/train.jsonl.gz

runs the trainer's preparation and its collator on all rows, at four lengths,
and compares prompt, chosen and rejected of every pair that either side keeps
with rules "trl"; TRL also keeps pairs of which no token is the prompt's, and
these are counted apart. (TRL from 0.29 to 1.8 made other ids in some pairs.)

Under `pip install trl==0.24.0 "transformers<5"`, the kind of TRL that the
dpo-replication system ran, it compares its rules in the same way with the
rows that reach the model. That TRL cut the two sequences of a pair each by its
own length: the prompt compared is the longer response's, and the pairs whose
shorter response was given more of it are counted.

Prints the versions, equal pairs of all, and a hash of TRL's ids, which the
tests know. Exits with 1 if a pair differs.
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
import tempfile

import datasets
import torch
import transformers
import trl

from dpo_jax.data import preferences, sources, tokenization
from dpo_jax.data import tokenizer as tokenizer_lib

OLD = hasattr(trl.DPOTrainer, "tokenize_row")
# max_length and max_prompt_length; the short ones cut and drop many pairs.
LENGTHS = (
  [(512, 358), (256, 128), (96, 48), (24, 8)]
  if OLD
  else [(512, 0), (256, 0), (96, 0), (24, 0)]
)
# Prompts whose end merges with a response into other tokens, up to the whole
# prompt, and one that only merges with the rejected response.
MERGING = [
  ("Say it:", ")", " yes"),
  ("Say it ", "word", "thing"),
  ("cafe", "\u0301 yes", "teria"),
  ("e", "\u0301", "xample"),
  ("Two words", " more", "mith and co"),
  ("line\n", "\n\nnext", "next"),
  ("tail  ", "  ", "\u2028 end"),
]


def trainer(backend, rows, max_length, max_prompt_length):
  """TRL's trainer of a model of a few hundred weights, on these rows."""
  config = transformers.GPTNeoXConfig(
    vocab_size=50304,
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=4,
    max_position_embeddings=2048,
  )
  lengths = {"max_length": max_length}
  if OLD:
    lengths["max_prompt_length"] = max_prompt_length
  return trl.DPOTrainer(
    model=transformers.GPTNeoXForCausalLM(config),
    ref_model=transformers.GPTNeoXForCausalLM(config),
    args=trl.DPOConfig(
      output_dir=tempfile.mkdtemp(),
      report_to="none",
      use_cpu=True,
      bf16=False,
      **lengths,
    ),
    train_dataset=datasets.Dataset.from_list(rows),
    processing_class=backend,
  )


def of_trl(backend, rows, max_length, _):
  """{row number: (prompt, chosen, rejected)} as collated, and how many more."""
  made = trainer(backend, rows, max_length, 0)
  found, bare = {}, 0
  for example in made.train_dataset:
    batch = made.data_collator([example])
    sides = []
    for side in (0, 1):
      real = batch["attention_mask"][side].bool()
      ids = batch["input_ids"][side][real]
      mask = batch["completion_mask"][side][real].bool()
      sides.append((ids[~mask].tolist(), ids[mask].tolist()))
    assert sides[0][0] == sides[1][0]
    if sides[0][0]:
      found[example["number"]] = (sides[0][0], sides[0][1], sides[1][1])
    else:
      bare += 1
  return found, f"{bare} without a prompt"


def of_old_trl(backend, rows, max_length, max_prompt_length):
  """The same of what reaches the model, and pairs with two prompts.

  A response that fills `max_length` leaves no prompt; such pairs are left out.
  """
  rows = [
    row | {side: row[side].strip() for side in ("chosen", "rejected")}
    for row in rows
  ]
  made = trainer(backend, rows, max_length, max_prompt_length)
  made.model.eval()
  seen = []
  made.model.register_forward_pre_hook(
    lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
  )
  found, two = {}, 0
  for example in made.train_dataset:
    batch = made.data_collator([example])
    seen.clear()
    with torch.no_grad():
      made.concatenated_forward(made.model, batch)
    ((args, kwargs),) = seen
    ids = args[0] if args else kwargs["input_ids"]
    mask = kwargs["attention_mask"].bool()
    both = [ids[side][mask[side]].tolist() for side in (0, 1)]
    sizes = [len(example[f"{s}_input_ids"]) for s in ("chosen", "rejected")]
    if max(sizes) >= max_length:
      continue
    prompts = [line[:-size] for line, size in zip(both, sizes)]
    longer = sizes.index(max(sizes))
    two += prompts[0] != prompts[1]
    found[example["number"]] = (
      prompts[longer],
      both[0][-sizes[0] :],
      both[1][-sizes[1] :],
    )
  return found, f"{two} with two prompts"


def main():
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("--tokenizer", required=True)
  flags.add_argument("--data", action="append", required=True)
  flags = flags.parse_args()
  for name in ("trl", "transformers", "tokenizers"):
    print(name, importlib.metadata.version(name))
  words = tokenizer_lib.load(flags.tokenizer)
  backend = transformers.AutoTokenizer.from_pretrained(flags.tokenizer)
  real = [
    (row.prompt, row.chosen, row.rejected)
    for path in flags.data
    for row in sources.read_file(str(path)).rows
  ]
  same = [
    compare(words, backend, name, texts, *lengths)
    for name, texts in (("real", real), ("merging", MERGING))
    for lengths in LENGTHS
  ]
  sys.exit(int(not all(same)))


def compare(words, backend, name, texts, max_length, max_prompt_length):
  """Prints a line, and says whether all pairs are the same on both sides."""
  # Numbers for ids: a pair may stand twice.
  pairs = [
    preferences.Comparison(str(i), *parts) for i, parts in enumerate(texts)
  ]
  rows = [
    {"number": i, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    for i, (prompt, chosen, rejected) in enumerate(texts)
  ]
  theirs, note = (of_old_trl if OLD else of_trl)(
    backend, rows, max_length, max_prompt_length
  )
  done = tokenization.tokenize(
    words,
    pairs,
    rules="dpo-replication" if OLD else "trl",
    max_length=max_length,
    max_prompt_length=max_prompt_length,
  )
  ours = {
    int(pair.id): (list(pair.prompt), list(pair.chosen), list(pair.rejected))
    for pair in done.table
  }
  either = ours.keys() | theirs.keys()
  equal = sum(ours.get(i) == theirs.get(i) for i in either)
  digest = hashlib.sha256()
  for i in sorted(theirs):
    digest.update((json.dumps(theirs[i]) + "\n").encode())
  print(
    f"{name}, max_length={max_length}, max_prompt_length={max_prompt_length}:"
    f" {equal} of {len(either)} kept pairs equal,"
    f" {len(pairs) - len(theirs)} of {len(pairs)} dropped,"
    f" {note}, TRL's ids {digest.hexdigest()[:16]};"
    f" ours {done.counts}",
    flush=True,
  )
  for i in [i for i in sorted(either) if ours.get(i) != theirs.get(i)][:3]:
    print(f"  {texts[i]!r}\n  TRL:  {theirs.get(i)}\n  ours: {ours.get(i)}")
  return equal == len(either)


if __name__ == "__main__":
  main()

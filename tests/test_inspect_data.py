"""The report on a run's data before anything is trained."""

import gzip
import json
import re

import numpy as np
import pytest
import tokenizers

from configs import data as data_config
from configs import dpo
from dpo_jax.core import console, settings
from dpo_jax.training import config as config_lib
from dpo_jax.training import inspect_data


def inspect(shared, rows, kind="sigmoid", **data):
  """The report on the real rows; token ids are not cached."""
  c = dpo.get_config("pythia-14m")
  c.loss.kind = kind
  c.tokenizer = str(shared / "tokenizer" / "pythia")
  c.data.sources.hh = data_config.hh(str(shared / "data" / "hh-rlhf"))
  c.data.sources.hh.subsets = ("harmless-base",)
  c.data.update({"token_cache": ""} | data)
  built = settings.build(config_lib.TrainSettings, c.to_dict())
  return inspect_data.run(built, rows)


def row_of(text, name):
  """The cells of a line after its name."""
  (line,) = re.findall(rf"^\s*{re.escape(name)}\s\s+(.*)$", text, re.MULTILINE)
  return line.split()


@pytest.fixture(scope="module")
def real(shared):
  return inspect(shared, 2, max_eval=0)


def test_rows_are_counted_by_reason(real):
  assert row_of(real, "read") == ["1556", "256"]
  assert row_of(real, "quarantined: empty chosen response") == ["4", "0"]
  assert row_of(
    real, "quarantined: rejected does not share chosen's prompt"
  ) == ["1", "1"]
  assert row_of(real, "kept") == ["1551", "255"]
  assert real.startswith(
    "dpo on hh, tokenization 'paper': 24 steps of 64 in an epoch, 15 items"
    " left out"
  )


def test_labels_are_shown_with_their_responses(shared):
  found = inspect(shared, 2, "kto", max_train=40, max_eval=4)
  assert re.search(r"^hh \w{16}, desirable$", found, re.MULTILINE)
  # Two labeled responses of each pair.
  assert found.count("undesirable") == 1
  assert "1 steps of 64 in an epoch, 16 items left out" in found
  # Their lengths, of either side.
  assert len(re.findall(r"^\s+mismatched\s", found, re.MULTILINE)) == 2


def test_lengths_and_cuts_are_those_of_the_tokens(real, shared):
  """Against the tokenizers library and the rule of the paper, by hand."""
  words = tokenizers.Tokenizer.from_file(
    str(shared / "tokenizer" / "pythia" / "tokenizer.json")
  )
  prompts, chosen, cut = [], [], 0
  path = shared / "data" / "hh-rlhf" / "harmless-base" / "train.jsonl.gz"
  for line in gzip.decompress(path.read_bytes()).splitlines():
    pair = json.loads(line)
    prompt, _, response = pair["chosen"].rpartition("\n\nAssistant:")
    prompt += "\n\nAssistant:"
    other = pair["rejected"][len(prompt) :]
    if not pair["rejected"].startswith(prompt) or not response.strip():
      continue
    sizes = [
      len(words.encode(text, add_special_tokens=False).ids)
      for text in (prompt, response, other)
    ]
    longer = max(sizes[1:]) + 1
    room = sizes[0]
    if sizes[0] + longer > 512 and sizes[0] > 256:
      room, cut = 256, cut + 1
    prompts.append(room)
    chosen.append(
      min(sizes[1] + 1, 256) if room + longer > 512 else sizes[1] + 1
    )
  first = real.index("Tokens\n")
  train = real[first : real.index("held out", first + 200)]
  for name, values in (("prompt", prompts), ("chosen", chosen)):
    cells = row_of(train, name)
    assert float(cells[-1]) == pytest.approx(np.mean(values), abs=0.05)
    assert int(cells[-2]) == max(values)
    middle = sorted(values)[(len(values) - 1) // 2]
    assert int(cells[1]) == middle
  assert row_of(train, "prompt cut") == [f"{cut / len(prompts):.1%}"]


def test_the_fill_of_rows_is_measured(real):
  tokens, slots, full = re.search(
    r"layout 'shared': ([\d.]+) tokens and ([\d.]+) slots an item, rows"
    r" ([\d.]+)% full",
    real,
  ).groups()
  # Two rows of 512 places would hold each pair alone.
  assert 0.92 * float(slots) < float(tokens) < float(slots) < 400
  assert float(full) == pytest.approx(100 * float(tokens) / float(slots), 1e-2)


def test_items_are_shown_with_what_is_learned(real):
  items = real[real.index("\nItems\n") :]
  assert items.count("[prompt]") == items.count("[/prompt]") == 2
  assert items.count("[chosen]") == items.count("[rejected]") == 2
  # Nothing but responses and their end is inside a response's mark.
  for text in re.findall(r"\[chosen\](.*?)\[/chosen\]", items, re.DOTALL):
    assert text.endswith("<|endoftext|>")
    assert "\n\nHuman:" not in text


def test_texts_cannot_steer_the_terminal():
  assert console.visible("a\x1b[31mb\r\nc\u202e\x00é👍") == (
    "a\\x1b[31mb\\r\nc\\u202e\\x00é👍"
  )

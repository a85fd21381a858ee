"""From files of comparisons to the token items that a stage trains on.

Everything that is dropped, cut or repeated on the way is counted by its reason;
the counts go into the run's manifest and from there into the report.
"""

import dataclasses
import hashlib
from typing import Any, Literal

from dpo_jax import batches, comparisons
from dpo_jax import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """What is read and how it becomes rows; see configs/common.py."""

  train_path: str
  train_split: str
  eval_path: str
  eval_split: str
  subsets: tuple[str, ...]
  skip_bad: int
  single_turn: bool
  max_train: int
  max_eval: int
  allow_leakage: bool
  max_length: int
  max_prompt_length: int
  responses: Literal["chosen", "both"]
  loss_on_prompt: bool
  layout: Literal["padded", "packed", "shared"]
  row_length: int

  def __post_init__(self):
    if not 0 < self.max_prompt_length < self.max_length:
      raise ValueError(
        f"data.max_prompt_length={self.max_prompt_length} must be between 1"
        f" and data.max_length - 1 ({self.max_length - 1})"
      )
    if self.row_length < self.max_length:
      raise ValueError(
        f"data.row_length={self.row_length} must be at least"
        f" data.max_length={self.max_length}"
      )
    for name in ("skip_bad", "max_train", "max_eval"):
      if getattr(self, name) < 0:
        raise ValueError(f"data.{name}={getattr(self, name)} is negative")


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Token items in file order, and what became of every row."""

  train: list[batches.Item]
  held_out: list[batches.Item]
  report: dict[str, Any]


def prepare(
  settings: DataSettings,
  objective: Literal["sft", "dpo"],
  tokenizer: tokenizer_lib.Tokenizer,
) -> Prepared:
  """Reads, checks and tokenises the training and the held-out rows.

  Raises:
    ValueError: a file is missing or malformed, nothing is left, a held-out
      prompt is trained on, or a piece does not fit into a row.
  """
  if objective == "sft" and settings.layout == "shared":
    raise ValueError(
      "data.layout='shared' is for pairs; SFT takes 'packed' or 'padded'"
    )
  if objective == "dpo" and settings.loss_on_prompt:
    raise ValueError(
      "data.loss_on_prompt=True changes nothing in a preference loss, where"
      " the prompt cancels out; set it to False"
    )
  loaded = {
    "train": _load(settings, "train"),
    "held_out": _load(settings, "eval"),
  }
  leaks = comparisons.leaks(loaded["train"].rows, loaded["held_out"].rows)
  if leaks and not settings.allow_leakage:
    raise ValueError(
      f"{leaks} held-out prompts of {settings.eval_path} are also trained on;"
      " mend the split, or set data.allow_leakage=True"
    )
  items, report = {}, {}
  for name, rows in loaded.items():
    counts = dict(rows.counts)
    pairs = tokenizer_lib.tokenize(
      tokenizer,
      rows.rows,
      max_length=settings.max_length,
      max_prompt_length=settings.max_prompt_length,
      counts=counts,
    )
    items[name] = _items(pairs, objective, settings.responses)
    counts["held-out prompts also trained on"] = leaks
    report[name] = {
      "counts": counts,
      "fingerprint": rows.fingerprint,
      "tokens": _fingerprint(items[name]),
    }
    if not items[name]:
      raise ValueError(f"{name}: nothing is left after tokenisation: {counts}")
    longest = batches.longest_piece(items[name], settings.layout)
    if longest > settings.row_length:
      raise ValueError(
        f"{name}: the longest piece takes {longest} tokens in layout"
        f" {settings.layout!r}; data.row_length={settings.row_length} must"
        " hold it"
      )
  return Prepared(items["train"], items["held_out"], report)


def _load(settings: DataSettings, name: str) -> comparisons.Loaded:
  return comparisons.load(
    getattr(settings, f"{name}_path"),
    split=getattr(settings, f"{name}_split"),
    subsets=settings.subsets,
    skip_bad=settings.skip_bad,
    single_turn=settings.single_turn,
    limit=getattr(settings, f"max_{name}"),
  )


def _fingerprint(items: list[batches.Item]) -> str:
  """A hash of what is trained on: rows, tokenizer and cut rule together."""
  digest = hashlib.sha256()
  for item in items:
    digest.update(repr(item).encode())
  return digest.hexdigest()[:16]


def _items(pairs, objective, responses) -> list[batches.Item]:
  if objective == "dpo":
    return pairs
  items = []
  for pair in pairs:
    items.append(batches.Example(pair.id, pair.prompt, pair.chosen))
    if responses == "both":
      items.append(batches.Example(pair.id, pair.prompt, pair.rejected))
  return items

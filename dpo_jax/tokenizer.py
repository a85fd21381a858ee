"""Text to token ids and back, and the rule that cuts what is too long.

Padding never uses the end-of-text id: Pythia has `<|padding|>` of its own, and
a model that is trained to stop must be able to tell the two apart.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from dpo_jax import comparisons

END = "<|endoftext|>"
PADDING = "<|padding|>"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A fast Hugging Face tokenizer with the few calls that we need."""

  backend: Any
  eos_id: int
  pad_id: int
  vocab_size: int

  def encode(self, text: str) -> list[int]:
    """Token ids of a text; nothing is added in front or behind.

    A tokenizer may have a normal form of its own (Pythia's is Unicode's NFC);
    `decode` gives that form of the text back.

    Raises:
      ValueError: the text holds a special token, which would become control.
    """
    return self.encode_all([text])[0]

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts, on all cores."""
    for text in texts:
      if special := self.special_in(text):
        raise ValueError(f"text holds the special token {special!r}: {text!r}")
    if not texts:
      return []
    return self.backend(list(texts), add_special_tokens=False)["input_ids"]

  def special_in(self, text: str) -> str | None:
    """The first special token that stands in the text, if any."""
    return next((token for token in self.specials if token in text), None)

  @functools.cached_property
  def specials(self) -> tuple[str, ...]:
    """Texts that are read as control tokens.

    Not `all_special_tokens`, which are those that have a role in the config:
    Pythia's own config gives `<|padding|>` none.
    """
    added = self.backend.added_tokens_decoder.values()
    return tuple(str(token) for token in added if token.special)

  def decode(self, ids: Iterable[int]) -> str:
    """The exact text of the ids, special tokens included."""
    return self.backend.decode(
      list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    transformers 5 names a class that transformers 4 does not know, and keeps
    where it had loaded from; both are mended.
    """
    self.backend.save_pretrained(os.fspath(directory))
    path = pathlib.Path(directory, "tokenizer_config.json")
    config = json.loads(path.read_text("utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
      config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a local directory or of a hub id.

  Raises:
    ValueError: there is none, it is a slow one, or it lacks an end-of-text or
      a padding token of its own. Another tokenizer is never taken instead.
  """
  import transformers

  name = os.fspath(path)
  if not name:
    raise ValueError(
      "the tokenizer's path is empty: name a directory or hub id"
    )
  if pathlib.Path(name).exists() and not (
    pathlib.Path(name, "tokenizer.json").is_file()
  ):
    raise ValueError(f"{name} holds no tokenizer.json")
  try:
    # Left unsaid, trust_remote_code asks at the terminal.
    backend = transformers.AutoTokenizer.from_pretrained(
      name, use_fast=True, trust_remote_code=False
    )
  except Exception as error:  # The tokenizers library raises nothing narrower.
    raise ValueError(
      f"no tokenizer at {name!r}: give a directory with tokenizer.json, or the"
      f" id of a model on the hub ({type(error).__name__}: {error})"
    ) from error
  return _wrap(backend, name)


def train(
  texts: Iterable[str], vocab_size: int, directory: str | os.PathLike
) -> Tokenizer:
  """Trains a byte-level BPE on texts and saves it.

  End of text is id 0 and padding id 1, as in Pythia.
  """
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END, PADDING],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  wrapped = _wrap(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend,
      bos_token=END,
      eos_token=END,
      unk_token=END,
      pad_token=PADDING,
      clean_up_tokenization_spaces=False,
    ),
    os.fspath(directory),
  )
  wrapped.save(directory)
  return wrapped


@dataclasses.dataclass(frozen=True)
class TokenizedPair:
  """One comparison as token ids; both responses end with EOS unless cut."""

  id: str
  prompt: tuple[int, ...]
  chosen: tuple[int, ...]
  rejected: tuple[int, ...]


def tokenize(
  tokenizer: Tokenizer,
  rows: Sequence[comparisons.Comparison],
  *,
  max_length: int,
  max_prompt_length: int,
  counts: dict[str, int],
) -> list[TokenizedPair]:
  """Tokenises comparisons by the rule of the official DPO code.

  Prompt and responses are tokenised apart, so that a response's ids do not
  depend on its prompt, and EOS is appended to both responses. If the prompt
  and the longer response pass `max_length` tokens, the prompt keeps its last
  `max_prompt_length`; if that is still too long, both responses keep their
  first `max_length - max_prompt_length`.

  Args:
    tokenizer: the model's own.
    rows: comparisons in order.
    max_length: tokens of a prompt with a response, EOS included.
    max_prompt_length: tokens of a prompt that had to be cut.
    counts: is added to, by reason: pairs dropped for a special token inside
      their text, prompts and responses cut.

  References:
    Rafailov et al., 2023 (arXiv 2305.18290), official code, HH tokenisation.
  """
  if not 0 < max_prompt_length < max_length:
    raise ValueError(
      f"max_prompt_length={max_prompt_length} must be between 1 and"
      f" max_length - 1 ({max_length - 1})"
    )
  kept = []
  for row in rows:
    texts = (row.prompt, row.chosen, row.rejected)
    if any(tokenizer.special_in(text) for text in texts):
      _count(counts, "holds a special token")
    else:
      kept.append(row)
  fields = ("prompt", "chosen", "rejected")
  columns = (
    tokenizer.encode_all([getattr(row, field) for row in kept])
    for field in fields
  )
  pairs = []
  for row, prompt, chosen, rejected in zip(kept, *columns, strict=True):
    chosen.append(tokenizer.eos_id)
    rejected.append(tokenizer.eos_id)
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length and len(prompt) > max_prompt_length:
      prompt = prompt[-max_prompt_length:]
      _count(counts, "prompt cut")
    if len(prompt) + longer > max_length:
      room = max_length - max_prompt_length
      chosen, rejected = chosen[:room], rejected[:room]
      _count(counts, "response cut")
    pairs.append(
      TokenizedPair(row.id, tuple(prompt), tuple(chosen), tuple(rejected))
    )
  return pairs


def _count(counts: dict[str, int], reason: str) -> None:
  counts[reason] = counts.get(reason, 0) + 1


def _wrap(backend: Any, name: str) -> Tokenizer:
  if not backend.is_fast:
    raise ValueError(f"{name} has no fast tokenizer (tokenizer.json)")
  eos, pad = backend.eos_token_id, backend.pad_token_id
  if pad is None:
    # Pythia's own files name no padding token, though the vocabulary has one.
    pad = backend.get_vocab().get(PADDING)
  if eos is None or pad is None or eos == pad:
    raise ValueError(
      f"{name}: end of text is id {eos} and padding id {pad}; both must exist"
      " and differ"
    )
  return Tokenizer(backend, int(eos), int(pad), len(backend))

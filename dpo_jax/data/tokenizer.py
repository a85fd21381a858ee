"""Tokenizer: text to token ids and back.

Padding uses the end-of-text id only where the vocabulary has no padding token:
attention and losses mask it, so that no result depends on its id.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dpo_jax.io import remote, strict_json

END = "<|endoftext|>"
PADDING = "<|padding|>"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A fast Hugging Face tokenizer, without special tokens in plain text."""

  backend: Any
  eos_id: int
  pad_id: int
  vocab_size: int

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, without BOS or EOS.

    A tokenizer may normalize its input (Pythia's to Unicode's NFC); `decode`
    returns the normalized text.

    Raises:
      ValueError: the text holds a special token, which would become control.
    """
    return self.encode_all([text])[0]

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts, on all cores."""
    for text in texts:
      if special := self.special_in(text):
        raise ValueError(f"text holds the special token {special!r}: {text!r}")
    encodings = self.backend.backend_tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated ids of many texts, int32, and their lengths, int64."""
    ids = self.encode_all(texts)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    chained = itertools.chain.from_iterable(ids)
    return np.fromiter(chained, np.int32, int(lengths.sum())), lengths

  def special_in(self, text: str) -> str | None:
    """The first special token in the text, if any."""
    return next((token for token in self.specials if token in text), None)

  @functools.cached_property
  def specials(self) -> tuple[str, ...]:
    """Texts that are encoded as control tokens.

    Not `all_special_tokens`, which has only those with a role in the config:
    Pythia's own config gives `<|padding|>` none.
    """
    added = self.backend.added_tokens_decoder.values()
    return tuple(str(token) for token in added if token.special)

  @functools.cached_property
  def adds_nothing(self) -> bool:
    """Whether a text followed by EOS's text encodes to its ids and `eos_id`.

    False for a tokenizer that by default adds tokens around every text, or
    whose EOS strips the white space before it.
    """
    text = "a b \n"
    whole = self.backend.backend_tokenizer.encode(text + self.backend.eos_token)
    return whole.ids == [*self.encode(text), self.eos_id]

  @functools.cached_property
  def fingerprint(self) -> str:
    """Sixteen hex digits: hash of all that ids depend on, but for the path."""
    digest = hashlib.sha256(self.backend.backend_tokenizer.to_str().encode())
    digest.update(b"%d %d" % (self.eos_id, self.pad_id))
    return digest.hexdigest()[:16]

  def decode(self, ids: Iterable[int]) -> str:
    """The exact text of the ids, special tokens included."""
    return self.backend.decode(
      list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def decode_each(self) -> list[str]:
    """The text of every token; incomplete UTF-8 decodes to U+FFFD."""
    return self.backend.backend_tokenizer.decode_batch(
      [[token] for token in range(self.vocab_size)], skip_special_tokens=False
    )

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    transformers 5 names a class that transformers 4 does not know, and writes
    the path that it loaded from; both are corrected.
    """
    self.backend.save_pretrained(os.fspath(directory))
    path = pathlib.Path(directory, "tokenizer_config.json")
    config = json.loads(path.read_text("utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
      config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a local directory or of a hub id, user/name@revision.

  Raises:
    ValueError: there is none, it is a slow one, or it has no end of text.
  """
  import transformers

  name = os.fspath(path)
  if not name:
    raise ValueError(
      "the tokenizer's path is empty: name a directory or hub id"
    )
  directory = pathlib.Path(name)
  if not directory.exists():
    try:
      directory = remote.fetch(name, weights=False)
    except ValueError as error:
      raise ValueError(
        f"no tokenizer at {name!r}: give a directory with tokenizer.json, or"
        f" the id of a model on the hub ({error})"
      ) from error
  if not (directory / "tokenizer.json").is_file():
    raise ValueError(f"{name} holds no tokenizer.json")
  strict_json.refuse_pointer(directory / "tokenizer.json")
  try:
    if _is_plain(directory):
      backend = transformers.PreTrainedTokenizerFast.from_pretrained(
        str(directory)
      )
    else:
      # Without trust_remote_code it asks at the terminal.
      backend = transformers.AutoTokenizer.from_pretrained(
        str(directory), use_fast=True, trust_remote_code=False
      )
  # The tokenizers library raises nothing narrower.
  except Exception as error:
    raise ValueError(
      f"no tokenizer at {name!r}: give a directory with tokenizer.json, or the"
      f" id of a model on the hub ({type(error).__name__}: {error})"
    ) from error
  return _wrap(backend, name)


def _is_plain(directory: pathlib.Path) -> bool:
  """Whether AutoTokenizer would choose PreTrainedTokenizerFast, as for our own.

  AutoTokenizer imports PyTorch, where that is installed, to find out: seconds
  of every start.
  """
  tokenizer_config, config = (
    strict_json.read_object(path) if path.is_file() else {}
    for path in (directory / "tokenizer_config.json", directory / "config.json")
  )
  # Classes of the model's own; the names are those of transformers 4 and 5.
  return (
    "auto_map" not in tokenizer_config | config
    and tokenizer_config.get("tokenizer_class")
    in ("PreTrainedTokenizerFast", "TokenizersBackend")
    and config.get("model_type", "gpt_neox") == "gpt_neox"
  )


def train(
  texts: Iterable[str], vocab_size: int, directory: str | os.PathLike
) -> Tokenizer:
  """Trains and saves a byte-level BPE; EOS is 0 and padding 1, as in Pythia."""
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


def _wrap(backend: Any, name: str) -> Tokenizer:
  if not backend.is_fast:
    raise ValueError(f"{name} has no fast tokenizer (tokenizer.json)")
  eos, pad = backend.eos_token_id, backend.pad_token_id
  if eos is None:
    raise ValueError(
      f"{name}: no end of text; set eos_token in tokenizer_config.json"
    )
  if pad is None or pad == eos:
    # Pythia's own config names no padding token, but its vocabulary has one.
    pad = backend.get_vocab().get(PADDING, eos)
  # A file may ask for both; truncation is for `tokenization`, which counts it.
  backend.backend_tokenizer.no_truncation()
  backend.backend_tokenizer.no_padding()
  return Tokenizer(backend, int(eos), int(pad), len(backend))

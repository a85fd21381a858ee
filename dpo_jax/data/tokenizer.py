"""Text to token ids and back.

Padding never uses the end-of-text id: Pythia has `<|padding|>` of its own, and
a model that is trained to stop must be able to tell the two apart.
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
# Of a tokenizer's files. Pythia's, of 50,277 tokens, has 2.4 MiB.
MAX_BYTES = 64 * 2**20
# Eighty times Pythia's.
MAX_TOKENS = 2**22
# What transformers reads of a directory.
_FILES = (
  "added_tokens.json",
  "config.json",
  "merges.txt",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
)


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
    encodings = self.backend.backend_tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`encode_all` end to end: ids, int32, and each text's length, int64."""
    ids = self.encode_all(texts)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    chained = itertools.chain.from_iterable(ids)
    return np.fromiter(chained, np.int32, int(lengths.sum())), lengths

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

  @functools.cached_property
  def adds_nothing(self) -> bool:
    """Whether a text that ends with EOS's text is its own ids and `eos_id`.

    False of a tokenizer that puts tokens around every text when it is not told
    otherwise, or whose EOS swallows the white space before it.
    """
    text = "a b \n"
    whole = self.backend.backend_tokenizer.encode(text + self.backend.eos_token)
    return whole.ids == [*self.encode(text), self.eos_id]

  @functools.cached_property
  def fingerprint(self) -> str:
    """Sixteen hex digits of what makes the ids, wherever it was loaded from."""
    digest = hashlib.sha256(self.backend.backend_tokenizer.to_str().encode())
    digest.update(b"%d %d" % (self.eos_id, self.pad_id))
    return digest.hexdigest()[:16]

  def decode(self, ids: Iterable[int]) -> str:
    """The exact text of the ids, special tokens included."""
    return self.backend.decode(
      list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def decode_each(self) -> list[str]:
    """The text of every token by itself; half a character is U+FFFD."""
    return self.backend.backend_tokenizer.decode_batch(
      [[token] for token in range(self.vocab_size)], skip_special_tokens=False
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
  """The tokenizer of a local directory or of a hub id, user/name@revision.

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
  for file in _FILES:
    if (directory / file).is_file():
      _check_size(directory / file)
  _check_ids(directory / "tokenizer.json")
  try:
    if _is_plain(directory):
      backend = transformers.PreTrainedTokenizerFast.from_pretrained(
        str(directory)
      )
    else:
      # Left unsaid, trust_remote_code asks at the terminal.
      backend = transformers.AutoTokenizer.from_pretrained(
        str(directory), use_fast=True, trust_remote_code=False
      )
  # The tokenizers library raises nothing narrower, and where it panics an
  # error that is no Exception.
  except BaseException as error:
    if not isinstance(error, Exception) and not _is_panic(error):
      raise
    raise ValueError(
      f"no tokenizer at {name!r}: give a directory with tokenizer.json, or the"
      f" id of a model on the hub ({type(error).__name__}: {error})"
    ) from error
  return _wrap(backend, name)


def _is_plain(directory: pathlib.Path) -> bool:
  """Whether AutoTokenizer would take PreTrainedTokenizerFast, as for our own.

  It imports PyTorch, where that is installed, to find out: seconds of every
  start. False wherever a class of the model's own may have a say.
  """
  names = ("tokenizer_config.json", "config.json")
  found = [
    strict_json.read_object(directory / name)
    if (directory / name).is_file()
    else {}
    for name in names
  ]
  if any("auto_map" in content for content in found):
    return False
  # As transformers 4 and 5 name it.
  kinds = ("PreTrainedTokenizerFast", "TokenizersBackend")
  return (
    found[0].get("tokenizer_class") in kinds
    and found[1].get("model_type", "gpt_neox") == "gpt_neox"
  )


def _check_size(file: pathlib.Path) -> None:
  """Refuses what no tokenizer has, before a library reads all of it."""
  strict_json.refuse_pointer(file)
  if (size := file.stat().st_size) > MAX_BYTES:
    raise ValueError(
      f"{file} has {size} bytes, more than {MAX_BYTES}: that is no file of a"
      " tokenizer"
    )


def _check_ids(file: pathlib.Path) -> None:
  """Refuses ids so high that the library would make room for all below."""
  try:
    content = strict_json.parse(file.read_bytes())
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from None
  found = content if isinstance(content, dict) else {}
  model, added = found.get("model"), found.get("added_tokens")
  vocabulary = model.get("vocab") if isinstance(model, dict) else None
  ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
  for token in added if isinstance(added, list) else ():
    ids.append(token.get("id") if isinstance(token, dict) else None)
  for number in ids:
    if type(number) is not int or not 0 <= number < MAX_TOKENS:
      raise ValueError(
        f"{file}: {number!r:.40} is no id of a token: ids are whole numbers"
        f" from 0 to {MAX_TOKENS - 1}"
      )


def _is_panic(error: BaseException) -> bool:
  return type(error).__name__ == "PanicException"


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
  # A file may ask for both; cutting is for a profile to do, and to count.
  backend.backend_tokenizer.no_truncation()
  backend.backend_tokenizer.no_padding()
  return Tokenizer(backend, int(eos), int(pad), len(backend))

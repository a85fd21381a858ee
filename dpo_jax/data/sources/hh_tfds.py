"""HH as a TensorFlow dataset with random access, without TensorFlow.

  python -m dpo_jax.data.sources.hh_tfds --path=DIR_OR_HUB_ID --data_dir=DIR

writes each subset and split once, as array_record files with TFDS's own
metadata; other programs read them with
`tfds.builder_from_directory(DIR/hh_rlhf/harmless-base/1.0.0)`. A row holds the
two transcripts unchanged and is parsed when it is read, so that its counts are
those of the original files.
"""

import argparse
import functools
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator

from dpo_jax.core import redaction
from dpo_jax.data import preferences
from dpo_jax.data.sources import files

SUBSETS = (
  "harmless-base",
  "helpful-base",
  "helpful-online",
  "helpful-rejection-sampled",
)
SPLITS = ("train", "test")
VERSION = "1.0.0"

_NAME = "hh_rlhf"


def write(
  path: str,
  data_dir: str | os.PathLike,
  *,
  subsets: tuple[str, ...] = SUBSETS,
  splits: tuple[str, ...] = SPLITS,
) -> dict[str, int]:
  """Writes HH's rows below `data_dir`; returns the row count of each subset.

  Args:
    path: as for `kind="hh"`: a directory in the dataset's own layout or a hub
      id.
    data_dir: gets `hh_rlhf/<subset>/1.0.0/`, each written atomically.
    subsets: of the dataset.
    splits: of each subset.

  Raises:
    ValueError: rows cannot be read, one is malformed (its file and line are
      named), or a subset is already there.
  """
  import tensorflow_datasets as tfds

  for subset in subsets:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", subset):
      raise ValueError(
        f"subset {subset!r:.80} must be 1 to 100 letters, digits, '.', '_' or"
        " '-', and begin with a letter or digit: it names a directory"
      )
    if folder(data_dir, subset).exists():
      raise ValueError(
        f"{folder(data_dir, subset)} is already there and is not written again:"
        " remove it, or name another data_dir"
      )
  written = {}
  for subset in subsets:
    builder = _builder_class()(
      path=str(path),
      splits=splits,
      data_dir=os.fspath(data_dir),
      config=tfds.core.BuilderConfig(name=subset),
      file_format="array_record",
    )
    builder.download_and_prepare()
    infos = builder.info.splits.values()
    written[subset] = sum(info.num_examples for info in infos)
  return written


def folder(data_dir: str | os.PathLike, subset: str) -> pathlib.Path:
  """The directory of a subset's files."""
  return pathlib.Path(data_dir) / _NAME / subset / VERSION


def read(data_dir: str, split: str, subsets: tuple[str, ...]) -> Iterator:
  """(origin, row, subset) for each row of one subset after another.

  Raises:
    ValueError: the subset was not written, has no such split, or is damaged.
  """
  for subset in subsets:
    rows = open_rows(data_dir, subset, split)
    for number in range(len(rows)):
      origin = f"{folder(data_dir, subset)}:{split}:{number + 1}"
      try:
        row = {name: text.decode() for name, text in rows[number].items()}
      # A lost record reads as one whose fields are no bytes.
      except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(
          f"{origin} cannot be read ({type(error).__name__}: {error}): remove"
          " the directory and write it again"
        ) from error
      yield origin, row, subset


def open_rows(data_dir: str | os.PathLike, subset: str, split: str):
  """A sequence of a subset's rows, each read when it is indexed.

  Raises:
    ValueError: the subset was not written, or has no such split.
  """
  import tensorflow_datasets as tfds

  directory = folder(data_dir, subset)
  if not (directory / "dataset_info.json").is_file():
    raise ValueError(
      f"{directory} holds no dataset: write it with python -m"
      f" dpo_jax.data.sources.hh_tfds --path=PATH --data_dir={data_dir}"
      f" --subsets={subset}"
    )
  builder = tfds.builder_from_directory(directory)
  if split not in builder.info.splits:
    raise ValueError(
      f"{directory} has no split {split!r}; it has {list(builder.info.splits)}"
    )
  return builder.as_data_source(split=split)


@functools.cache
def _builder_class():
  """The builder class, defined on first use: TFDS is slow to import."""
  import tensorflow_datasets as tfds

  class HhRlhf(tfds.core.GeneratorBasedBuilder):
    """Anthropic's HH: two transcripts, `chosen` preferred by people."""

    name = _NAME
    VERSION = tfds.core.Version(VERSION)
    # TFDS's own search for it needs importlib_resources, which it does not
    # install.
    code_path = pathlib.Path(__file__)

    def __init__(self, *, path: str, splits: tuple[str, ...], **kwargs):
      self._path, self._splits = path, splits
      super().__init__(**kwargs)

    def _info(self):
      # Without the metadata files of a registered builder.
      return tfds.core.DatasetInfo(
        builder=self,
        description="Pairs of transcripts; people preferred `chosen`.",
        homepage="https://huggingface.co/datasets/Anthropic/hh-rlhf",
        features=tfds.features.FeaturesDict(
          {"chosen": tfds.features.Text(), "rejected": tfds.features.Text()}
        ),
        supervised_keys=None,
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split):
      subset = self.builder_config.name
      yield from enumerate(_transcripts(self._path, split, subset))

  return HhRlhf


def _transcripts(path: str, split: str, subset: str) -> Iterator[dict]:
  rows = files.read(
    path,
    split,
    (subset,),
    subset_is="data_dir",
    subsets_required=True,
    streaming=False,
    counts={},
  )
  for origin, row, _ in rows:
    try:
      if isinstance(row, preferences.Malformed):
        raise row
      row = preferences.mapping(row)
      if "prompt" in row:
        raise preferences.Malformed("field 'prompt' in a row of transcripts")
      yield {
        name: preferences.text(row, name) for name in ("chosen", "rejected")
      }
    except preferences.Malformed as error:
      raise ValueError(f"{origin}: {error}; fix or remove the line") from error


def main() -> int:
  redaction.install()
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax.data.sources.hh_tfds",
    description="Writes HH as a TensorFlow dataset of array_record files.",
  )
  parser.add_argument("--path", default="Anthropic/hh-rlhf")
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--subsets", default=",".join(SUBSETS))
  parser.add_argument("--splits", default=",".join(SPLITS))
  given = parser.parse_args()
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    written = write(
      given.path,
      given.data_dir,
      subsets=tuple(given.subsets.split(",")),
      splits=tuple(given.splits.split(",")),
    )
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for subset, number in written.items():
    print(f"{number} rows in {folder(given.data_dir, subset)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())

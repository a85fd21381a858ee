"""Comparisons of a source, with counts of every row and pair by reason.

A source is a path and a row form. Each row gives one pair or several, and each
row and pair is either kept or counted under the reason why not:

  read                     rows
  malformed: ...           rows of no known form, at most `skip_bad`
  quarantined: ...         rows or pairs that no preference can be learned from
  filtered: ...            rows or pairs that the settings leave out
  accepted: ...            lines with a byte order mark or CRLF
  kept, kept, ...          pairs, and notable ones among them
"""

import dataclasses
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from dpo_jax.core import settings
from dpo_jax.data import preferences
from dpo_jax.data.sources import files, shp, stack_exchange, tldr

Kind = Literal["pairs", "unpaired", "hh", "shp", "se", "tldr", "tfds"]
Side = Literal["train", "eval"]


def _stays_inside(name: str) -> bool:
  """Whether a relative path stays in its directory."""
  path = pathlib.PurePosixPath(name)
  return (
    not path.is_absolute()
    and ".." not in path.parts
    and "\0" not in name
    and len(name.encode("utf-8", "replace")) <= 255
  )


@dataclasses.dataclass(frozen=True)
class SourceSettings:
  """Path and row form of a source; see configs/data.py."""

  kind: Kind
  train_path: str
  train_split: str
  eval_path: str
  eval_split: str
  held_out: float
  subsets: tuple[str, ...]
  weight: float
  streaming: bool
  min_score_ratio: float
  max_pairs_per_prompt: int

  def __post_init__(self):
    def refuse(field: str, must: str):
      raise ValueError(f"{field}={getattr(self, field)!r} {must}")

    settings.check(self)
    if not self.train_path:
      refuse("train_path", "must name a file, a directory or a hub id")
    if self.eval_path and self.held_out != 0:
      refuse(
        "held_out",
        f"must be 0, as eval_path={self.eval_path!r} has the held-out rows",
      )
    if not self.eval_path and not 0 < self.held_out < 1:
      refuse(
        "held_out",
        "must be a share between 0 and 1, as eval_path='' holds out a share"
        " of the training side's prompts",
      )
    for name in (*self.subsets, self.train_split, self.eval_split):
      if not _stays_inside(name):
        raise ValueError(
          f"{name!r:.80} must name a subset or split within its dataset: no"
          " '..', no path from the root, at most 255 characters"
        )
    if len(set(self.subsets)) < len(self.subsets):
      refuse("subsets", "names one twice")
    if self.kind != "shp" and self.min_score_ratio != 1:
      refuse(
        "min_score_ratio", f"is for kind='shp': set it to 1 for {self.kind!r}"
      )
    if self.kind not in ("shp", "se") and self.max_pairs_per_prompt:
      refuse(
        "max_pairs_per_prompt",
        f"is for kinds 'shp' and 'se': set it to 0 for {self.kind!r}",
      )
    if self.kind == "tfds" and not self.subsets:
      refuse("subsets", "must name what was written, such as harmless-base")
    if self.kind == "tfds" and self.streaming:
      refuse("streaming", "is for the hub: set it to False for 'tfds'")


@dataclasses.dataclass(frozen=True)
class FilterSettings:
  """Which pairs are left out; see configs/data.py.

  Lengths are in characters (code points), without white space at the ends.
  """

  single_turn: bool
  max_turns: int
  min_response_chars: int
  max_response_chars: int
  max_prompt_chars: int
  drop_repeats: bool
  skip_bad: int

  def __post_init__(self):
    settings.check(self)
    if 0 < self.max_response_chars < self.min_response_chars:
      raise ValueError(
        f"max_response_chars={self.max_response_chars} must be at least"
        f" min_response_chars={self.min_response_chars}, or 0 for no limit"
      )
    if self.single_turn and self.max_turns > 1:
      raise ValueError(
        f"max_turns={self.max_turns} contradicts single_turn=True: set it to 0"
      )


def load(
  source: SourceSettings, side: Side, filters: FilterSettings, limit: int
) -> preferences.Loaded:
  """The comparisons of one side of a source, in the order of its files.

  Args:
    source: path and row form.
    side: "train", or "eval": the rows of `eval_path`, or, if that is "", those
      of `train_path` whose prompts `is_held_out`.
    filters: which pairs are left out.
    limit: reading ends with this many kept pairs; 0 reads all.

  Raises:
    ValueError: nothing is there, more than `skip_bad` rows are malformed (file,
      line and field are named), or no pair is left.
  """
  if limit < 0:
    raise ValueError(f"limit={limit} is negative; 0 keeps all")
  counts: Counter[str] = Counter()
  pairs = _left(_parsed(source, side, filters, counts), source, filters, counts)
  kept = tuple(itertools.islice(pairs, limit) if limit else pairs)
  path = _place(source, side)[0]
  _refuse_misread(kept, path)
  counts["kept"] = len(kept)
  counts.update(_notable(kept))
  if not kept:
    left = f"no comparison is left of {dict(counts)}"
    raise ValueError(f"{path}: {left if counts['read'] else 'no rows'}")
  return preferences.Loaded(kept, dict(counts), preferences.fingerprint(kept))


def read_file(path: str) -> preferences.Loaded:
  """All comparisons of one file of pairs; errors as in `load`."""
  source = SourceSettings(
    kind="pairs",
    train_path=path,
    train_split="",
    eval_path=path,
    eval_split="",
    held_out=0.0,
    subsets=(),
    weight=1.0,
    streaming=False,
    min_score_ratio=1.0,
    max_pairs_per_prompt=0,
  )
  everything = FilterSettings(
    single_turn=False,
    max_turns=0,
    min_response_chars=0,
    max_response_chars=0,
    max_prompt_chars=0,
    drop_repeats=False,
    skip_bad=0,
  )
  return load(source, "train", everything, 0)


def is_held_out(prompt: str, share: float) -> bool:
  """Whether a prompt is in the held-out share, by a hash of its text.

  The split does not change when rows are added, removed or reordered, and a
  larger share holds out all that a smaller one does.
  """
  return int(preferences.content_id("held out", prompt), 16) < share * 2**64


def _place(source: SourceSettings, side: Side) -> tuple[str, str]:
  """Path and split of a side."""
  if side == "eval" and source.eval_path:
    return source.eval_path, source.eval_split
  return source.train_path, source.train_split


def _rows(source: SourceSettings, side: Side, counts) -> Iterator:
  """(origin, row or Malformed, subset) for each row of a side."""
  path, split = _place(source, side)
  if source.kind == "tfds":
    from dpo_jax.data.sources import hh_tfds

    return hh_tfds.read(path, split, source.subsets)
  return files.read(
    path,
    split,
    source.subsets,
    subset_is="data_dir" if source.kind in ("hh", "shp", "se") else "name",
    subsets_required=source.kind == "hh",
    streaming=source.streaming,
    counts=counts,
  )


def _texts(source: SourceSettings, row: Any) -> tuple[list[Any], str]:
  """A row's pairs, or labeled response, and the row's domain.

  A pair is a tuple of texts, or a filter's reason.
  """
  if isinstance(row, preferences.Malformed):
    raise row
  match source.kind:
    case "shp":
      return [shp.texts(row, source.min_score_ratio)], shp.domain(row)
    case "se":
      return stack_exchange.texts(row), stack_exchange.site(row)
    case "tldr":
      return [tldr.texts(row)], tldr.subreddit(row)
    case "unpaired":
      return [preferences.labeled(row)], ""
    case _:
      return [preferences.texts(row)], ""


def _parsed(source, side, filters, counts) -> Iterator[preferences.Comparison]:
  """Every pair of the side; other rows and pairs are counted."""
  bad = 0
  for origin, row, subset in _rows(source, side, counts):
    counts["read"] += 1
    try:
      found, domain = _texts(source, row)
    except preferences.Malformed as error:
      bad += 1
      if bad > filters.skip_bad:
        raise ValueError(
          f"{origin}: {error}; {bad} malformed rows,"
          f" skip_bad={filters.skip_bad}"
        ) from error
      counts[f"malformed: {error.reason}"] += 1
      continue
    except preferences.Quarantined as error:
      counts[f"quarantined: {error}"] += 1
      continue
    if source.kind == "se":
      counts["pairs of answers"] += len(found)
    for texts in found:
      if isinstance(texts, str):
        counts[f"filtered: {texts}"] += 1
        continue
      try:
        if isinstance(texts, preferences.Comparison):
          pair = dataclasses.replace(texts, subset=subset)
        else:
          pair = preferences.pair(*texts, subset or domain)
      except preferences.Quarantined as error:
        counts[f"quarantined: {error}"] += 1
        continue
      if not source.eval_path:
        held_out = is_held_out(pair.prompt, source.held_out)
        if held_out != (side == "eval"):
          why = "held out" if held_out else "trained on"
          counts[f"filtered: the prompt is {why}"] += 1
          continue
      yield pair


def _left(
  pairs: Iterable[preferences.Comparison], source, filters, counts
) -> Iterator[preferences.Comparison]:
  """Pairs that pass the filters; the others are counted."""
  seen: set[str] = set()
  of_prompt: Counter[str] = Counter()
  for pair in pairs:
    reason = _reason(pair, filters)
    if not reason and filters.drop_repeats and pair.id in seen:
      reason = "repeats an earlier pair"
    most = source.max_pairs_per_prompt
    if not reason and most and of_prompt[pair.prompt] == most:
      reason = f"more than {most} pairs of a prompt"
    if reason:
      counts[f"filtered: {reason}"] += 1
      continue
    if filters.drop_repeats:
      seen.add(pair.id)
    if most:
      of_prompt[pair.prompt] += 1
    yield pair


def _reason(pair: preferences.Comparison, filters: FilterSettings) -> str:
  """The first filter that a pair does not pass, or ""."""
  # 0 in a prompt that is not written as turns.
  turns = pair.prompt.count(preferences.HUMAN)
  if filters.single_turn and turns > 1:
    return "several turns"
  if 0 < filters.max_turns < turns:
    return f"more than {filters.max_turns} turns"
  if 0 < filters.max_prompt_chars < len(pair.prompt.strip()):
    return f"prompt longer than {filters.max_prompt_chars} characters"
  lengths = [len(text.strip()) for text in pair.responses]
  if min(lengths) < filters.min_response_chars:
    return f"response shorter than {filters.min_response_chars} characters"
  if 0 < filters.max_response_chars < max(lengths):
    return f"response longer than {filters.max_response_chars} characters"
  return ""


# `[{"role": ...` as JSON or as Python prints it.
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


def _refuse_misread(
  kept: tuple[preferences.Comparison, ...], path: str
) -> None:
  """Refuses pairs most of which are of another form than they were read as.

  A single text may look like either by chance.
  """
  repeating = stored = 0
  for pair in kept:
    repeating += all(x.startswith(pair.prompt) for x in pair.responses)
    stored += all(map(_MESSAGES_AS_TEXT.match, pair.responses))
  if 2 * repeating > len(kept):
    raise ValueError(
      f"{path}: in {repeating} of {len(kept)} pairs both responses begin with"
      " their prompt, which would be trained on twice; remove it from chosen"
      " and rejected"
    )
  if 2 * stored > len(kept):
    raise ValueError(
      f"{path}: in {stored} of {len(kept)} pairs chosen and rejected hold lists"
      " of messages written as text; store them as lists (json.loads, or"
      " ast.literal_eval for Python's form)"
    )


def _notable(kept: tuple[preferences.Comparison, ...]) -> dict[str, int]:
  """Counts of repeated and contradicting pairs, without zeros."""
  seen: set[str] = set()
  repeated = reversed_ = 0
  for pair in kept:
    repeated += pair.id in seen
    other = (pair.prompt, pair.rejected, pair.chosen)
    reversed_ += preferences.content_id(*other) in seen
    seen.add(pair.id)
  counts = {
    "kept, repeating an earlier pair": repeated,
    "kept, preferring the opposite of an earlier pair": reversed_,
  }
  return {reason: number for reason, number in counts.items() if number}

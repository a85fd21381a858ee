"""What dpo_step's rows say: speeds, ratios, peak memory, TRL's best settings.

A row is one process, a line of JSON. One with "settings" is an attempt of TRL
at these settings, of a few updates; the others are measurements. Rows are of
one case if model and allocator are the same, and only those are compared.
"""

import collections
import itertools
import json
import math
import pathlib
import statistics

# Updates left out of the times: first ones compile, or warm caches up.
WARM = 2
# How far two loss curves may be apart. Both sides compute in float32; sums of
# 400 nats a response round at 3e-5, times beta, and updates carry it on.
TOLERANCE = 2e-4
# What the name of a TRL ends with that is padding-free though its best is not.
FREE = ", padding-free"
# Likewise two norms of TRL's gradient, in proportion.
SAME_NORM = 1e-3


def read(path: pathlib.Path) -> list[dict]:
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def speed(row: dict) -> float:
  """Pairs a second over the measured updates of one process."""
  seconds = row["seconds"][1 if "settings" in row else WARM :]
  return row["batch_size"] * len(seconds) / sum(seconds)


def next_attempt(tried: list[dict], sizes: list[int]) -> dict | None:
  """The settings that TRL is to try next, or None when all were.

  First padded rows in micro-batches of 4, whose gradient the others must have;
  then all sizes, padding-free in TRL 0.x; then, at the best size, both
  attentions and paddings; then, in TRL 0.x, which can, logits of no more places
  than from the first predicted token on.

  Args:
    tried: rows of the attempts so far, of one TRL and case.
    sizes: of micro-batches.
  """
  wanted = [setting(4, "sdpa", False)]
  if tried:
    free = tried[0]["versions"]["trl"].startswith("0.")
    wanted += [setting(size, "sdpa", free) for size in sizes]
  done = [row["settings"] for row in tried]
  if all(one in done for one in wanted) and tried:
    size = fastest(tried)["micro_batch"]
    ways = itertools.product(("sdpa", "eager"), (False, True))
    wanted += [setting(size, *way) for way in ways]
    if free:
      wanted += [setting(size, "sdpa", way, True) for way in (False, True)]
  return next((one for one in wanted if one not in done), None)


def setting(
  micro_batch: int,
  attention: str,
  padding_free: bool,
  logits_to_keep: bool = False,
) -> dict:
  return {
    "micro_batch": micro_batch,
    "attention": attention,
    "padding_free": padding_free,
    "logits_to_keep": logits_to_keep,
  }


def fastest(tried: list[dict]) -> dict:
  """The settings of the most pairs a second with the gradient of the first.

  Raises:
    ValueError: no attempt is left.
  """
  able = [row for row in tried if same(row, tried[0])]
  if not able:
    raise ValueError(f"{tried[0]['name']} refuses: {tried[0]['refused']}")
  return max(able, key=speed)["settings"]


def contenders(tried: list[dict]) -> dict[str, dict]:
  """What is measured of one TRL: {name: {"best": settings}}.

  Its fastest settings; and those that are padding-free, where TRL 0.x, whose
  way of saving work that is, is faster without.

  Args:
    tried: rows of all its attempts.
  """
  name, best = tried[0]["name"], fastest(tried)
  found = {name: {"best": best}}
  free = [row for row in tried if row["settings"]["padding_free"]]
  free = [row for row in free if same(row, tried[0])]
  old = tried[0]["versions"]["trl"].startswith("0.")
  if old and free and not best["padding_free"]:
    found[name + FREE] = {"best": max(free, key=speed)["settings"]}
  return found


def same(row: dict, first: dict) -> bool:
  """Whether an attempt computed the gradient of the first."""
  if "refused" in row or "refused" in first:
    return False
  ratio = row["grad_norms"][0] / first["grad_norms"][0]
  return abs(ratio - 1) < SAME_NORM


def check(rows: list[dict]) -> float:
  """The greatest distance of two loss curves.

  Raises:
    ValueError: a loss of step 0 is not ln 2, or curves differ.
  """
  for row in rows:
    if abs(row["losses"][0] - math.log(2)) > TOLERANCE:
      raise ValueError(f"{row['name']}: loss {row['losses'][0]} at step 0")
  far = 0.0
  for values in zip(*(row["losses"] for row in rows), strict=True):
    far = max(far, max(values) - min(values))
  if far > TOLERANCE:
    curves = "\n".join(f"{row['name']}: {row['losses']}" for row in rows)
    raise ValueError(f"loss curves differ by {far}:\n{curves}")
  return far


def case(row: dict) -> str:
  """What rows must share to be compared."""
  kept = {"keeping": "memory kept", "default": "memory given back"}
  return f"{row['model']}, {kept[row['malloc']]}"


def cases(rows: list[dict]) -> dict[str, list[dict]]:
  found = collections.defaultdict(list)
  for row in rows:
    found[case(row)].append(row)
  return dict(found)


def table(rows: list[dict], first: str) -> str:
  """Medians over processes of the same name, and ratios of medians to `first`.

  Raises:
    ValueError: rows of one case did other work than each other; see `check`.
  """
  return "\n\n".join(_table(group, first) for group in cases(rows).values())


def bars(rows: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
  """{case: {contender: (pairs a second, peak GiB)}}, medians of both."""
  return {
    name: {
      contender: (_speed(one), _peak(one) / 2**30)
      for contender, one in measured(group).items()
    }
    for name, group in cases(rows).items()
  }


def measured(rows: list[dict]) -> dict[str, list[dict]]:
  """Measurements by contender, in the order they first came in."""
  groups = collections.defaultdict(list)
  for row in rows:
    if "settings" not in row:
      groups[row["name"]].append(row)
  return dict(groups)


def _speed(rows: list[dict]) -> float:
  return statistics.median(map(speed, rows))


def _peak(rows: list[dict]) -> float:
  return statistics.median(row["peak_rss_bytes"] for row in rows)


def _table(rows: list[dict], first: str) -> str:
  groups = measured(rows)
  attempts = collections.defaultdict(list)
  for row in rows:
    if "settings" in row:
      attempts[row["name"]].append(row)
  lines = [case(rows[0])]
  if groups:
    lines = _measurements(
      groups, first if first in groups else next(iter(groups))
    )
  for name, tried in attempts.items():
    lines += ["", f"{name} ({versions(tried[0])}), pairs a second tried:"]
    lines += [f"- {_tried(row, tried[0])}" for row in tried]
  return "\n".join(lines)


def _measurements(groups: dict[str, list[dict]], first: str) -> list[str]:
  every = [row for group in groups.values() for row in group]
  far = check(every)
  one = every[0]
  counts = one["tokens_a_pair"]
  lines = [
    f"{case(one)}: {len(one['losses'])} updates of {one['batch_size']} pairs,"
    f" of which the last {len(one['losses']) - WARM} are timed; tokens a pair"
    f" {counts['shared']:.1f} ({counts['apart']:.1f} with two prompts),"
    f" completions {counts['completion']:.1f}; loss curves equal to {far:.1e};"
    f" {one['machine']}",
    "",
    f"| | pairs a second | {first} is so many times as fast | peak memory |"
    f" memory of {first} | page faults | processor seconds, the system's |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, group in groups.items():
    speeds = [speed(row) for row in group]
    faults, user, system = (
      statistics.median(row[key] for row in group)
      for key in ("page_faults", "user_seconds", "system_seconds")
    )
    lines.append(
      f"| {name} | {_speed(group):.2f} [{min(speeds):.2f}, {max(speeds):.2f}]"
      f" | {_speed(groups[first]) / _speed(group):.2f}"
      f" | {_peak(group) / 2**30:.2f} GiB"
      f" | {_peak(groups[first]) / _peak(group):.0%}"
      f" | {faults / 1e6:.2f} million | {user + system:.0f}, {system:.0f} |"
    )
  return lines


def versions(row: dict) -> str:
  return ", ".join(f"{name} {v}" for name, v in row["versions"].items())


def _tried(row: dict, first: dict) -> str:
  settings = row["settings"]
  padding = "padding-free" if settings["padding_free"] else "padded"
  padding += ", logits_to_keep" * settings["logits_to_keep"]
  text = (
    f"micro-batches of {settings['micro_batch']}, {settings['attention']},"
    f" {padding}: "
  )
  if "refused" in row:
    return text + "refused: " + row["refused"].splitlines()[0]
  wrong = "" if same(row, first) else ", with another gradient: not taken"
  return (
    f"{text}{speed(row):.2f}, {row['peak_rss_bytes'] / 2**30:.2f} GiB{wrong}"
  )

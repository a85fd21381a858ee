"""The README.md of a pushed model, from the run's own files.

Every number is read from the files that the run left; what a file does not say
the card does not say either. Its text is card.md.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_jax.io import markdown, metrics, remote, strict_json

FIGURE = "win_rate_temperature.png"
_TEMPLATE = pathlib.Path(__file__).with_name("card.md")


def make(
  directory: pathlib.Path,
  config: Mapping[str, Any],
  manifest: Mapping[str, Any],
  branch: str,
  *,
  repo: str,
  license: str,
) -> tuple[str, pathlib.Path | None]:
  """The card of a branch, and the figure that it shows.

  The report that gives the finished model's win rates is in the run's
  directory, or beside it as `replicate` has it.
  """
  import huggingface_hub

  step = int(branch.removeprefix("step-")) if branch != "main" else 0
  dpo, lora = config["objective"] == "dpo", config["lora"]["rank"] > 0
  report, figure = ({}, None) if step else _report(directory)
  rates = [
    rate
    for rate in report.get("rates", [])
    if rate["step"] is None and rate["win_rate"] is not None
  ]
  data = config["data"]
  read = [data["sources"][name]["train_path"] for name in data["use"]]
  names = ["optimizer", "batch_size", "epochs", "seed"]
  names += ["loss"] * dpo + ["lora"] * lora
  recipe = {name: config[name] for name in names}
  recipe["data"] = {name: data[name] for name in ("max_length", "tokenization")}
  card = huggingface_hub.ModelCard.from_template(
    huggingface_hub.ModelCardData(
      library_name="peft" if lora and step else "transformers",
      pipeline_tag="text-generation",
      tags=["dpo_jax", "jax", config["objective"]],
      license=license or None,
      base_model=next(iter(_on_hub([config["model"]["path"]])), None),
      datasets=_on_hub(read) or None,
    ),
    template_path=str(_TEMPLATE),
    config=config,
    manifest=manifest,
    branch=branch,
    repo=repo,
    license=license,
    step=step,
    dpo=dpo,
    lora=lora,
    recipe=json.dumps(recipe, indent=2),
    metrics=_metrics(directory, step or manifest["steps"]),
    report=report,
    rates=rates,
    figure=figure if rates else None,
    versions=", ".join(map(" ".join, manifest["versions"].items())),
    literal=markdown.literal,
  )
  return f"{card}\n", figure if rates else None


def _on_hub(names: Iterable[str]) -> list[str]:
  ids = {name.partition("@")[0] for name in names}
  return sorted(filter(remote.is_repository, ids))


def _report(directory: pathlib.Path) -> tuple[dict, pathlib.Path | None]:
  for parent in (directory, directory.parent):
    path = parent / "report" / "numbers.json"
    if path.is_file():
      figure = path.with_name(FIGURE)
      return strict_json.read(path), figure if figure.is_file() else None
  return {}, None


def _metrics(directory: pathlib.Path, step: int) -> dict[str, Any]:
  path = directory / metrics.FILE
  return {
    key: f"{value:.4g}" if isinstance(value, float) else value
    for row in (metrics.read(path) if path.is_file() else [])
    for key, value in row.items()
    if row["step"] == step and not (key == "step" or math.isnan(float(value)))
  }

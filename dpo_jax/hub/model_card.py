"""Model card of a pushed branch: card.md, filled from the run's own files."""

import json
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
  settings: Any,
  branch: str,
) -> tuple[str, pathlib.Path | None]:
  """Text of the card, and the figure that it shows."""
  import huggingface_hub

  step = int(branch.removeprefix("step-")) if branch != "main" else 0
  dpo, lora = config["objective"] == "dpo", config["lora"]["rank"] > 0
  report, figure = {}, None
  # `replicate` writes the report next to the run's directory.
  for parent in () if step else (directory.parent, directory):
    path = parent / "report" / "numbers.json"
    if path.is_file():
      report, figure = strict_json.read(path), path.with_name(FIGURE)
  figure = figure if figure and figure.is_file() else None
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
      license=settings.license or None,
      base_model=next(iter(_on_hub([config["model"]["path"]])), None),
      datasets=_on_hub(read) or None,
    ),
    template_path=str(_TEMPLATE),
    config=config,
    manifest=manifest,
    branch=branch,
    settings=settings,
    step=step,
    dpo=dpo,
    lora=lora,
    recipe=json.dumps(recipe, indent=2),
    rows=metrics.read(directory / metrics.FILE),
    report=report,
    figure=figure,
    literal=markdown.literal,
  )
  return f"{card}\n", figure


def _on_hub(names: Iterable[str]) -> list[str]:
  ids = {name.partition("@")[0] for name in names}
  return sorted(filter(remote.is_repository, ids))

"""The README.md of a pushed model: what it is, from the run's own files.

Every number is read from the files that the run left; what a file does not say
the card does not say either.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_jax.io import markdown, metrics, remote, strict_json

FIGURE = "win_rate_temperature.png"
_LIMITS = """\
- It was trained to prefer what one dataset's annotators preferred, and can be
  wrong, offensive or harmful as its base model can. It was not tested for any
  use with people.
- {judged}
- Log-probs and losses were computed in float32 and the blocks in {dtype}: other
  precisions give slightly other answers."""
_NOT_JUDGED = (
  "No win rate was measured in this run: what the metrics above say of answers"
  " is the model's own log-probs of given texts."
)
_JUDGED = (
  "The win rates are one judge's ({judge}), on {prompts} prompts: another judge"
  " or other prompts give others, and the intervals cover the choice of prompts"
  " alone."
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run to be pushed.

  Attributes:
    directory: of the run. A report beside it, or above it as `replicate` lays
      them, gives win rates and their figure.
    config: its config.json, the paths as `hub.named` has them.
    manifest: its manifest.json, likewise.
    repo: user/name that it is pushed to.
    licence: as the hub names it; "" states none.
  """

  directory: pathlib.Path
  config: dict[str, Any]
  manifest: dict[str, Any]
  repo: str
  licence: str


def of_run(run: Run) -> tuple[str, pathlib.Path | None]:
  """The card of a finished run's model, and the figure that it shows."""
  config, manifest = run.config, run.manifest
  report = _report(run.directory)
  numbers = strict_json.read(report / "numbers.json") if report else {}
  figure = report / FIGURE if report and (report / FIGURE).is_file() else None
  dpo = config["objective"] == "dpo"
  title = "DPO" if dpo else "Supervised fine-tuning"
  parts = [
    _front(run, "transformers"),
    f"# {title} of {config['model']['path']}",
    f"Trained with dpo_jax: {manifest['parameters']['trained']:,} of"
    f" {sum(manifest['parameters'][k] for k in ('base', 'lora')):,} parameters,"
    f" {manifest['steps']:,} updates of {config['batch_size']}"
    f" {'pairs' if dpo else 'examples'}.{_where(config)}",
    _usage(run.repo),
    "## Recipe",
    _recipe(config),
    "## Data",
    _data(manifest),
    "## Metrics",
    _last(run.directory),
  ]
  if numbers.get("rates"):
    parts += ["## Win rates against the preferred answer", _rates(numbers)]
    if figure is not None:
      parts.append(f"![Win rate against temperature]({FIGURE})")
  judged = _NOT_JUDGED
  if numbers.get("rates"):
    health = numbers["health"]
    judged = _JUDGED.format(judge=health["judge"], prompts=health["prompts"])
  parts += [
    "## Limitations",
    _LIMITS.format(judged=judged, dtype=config["model"]["dtype"]),
    "## Licence",
    _licence(run.licence),
    "## To reproduce",
    _command(manifest),
  ]
  return "\n\n".join(parts) + "\n", figure


def of_checkpoint(run: Run, step: str) -> str:
  """The card of a checkpoint's branch, "step-000100"."""
  config, manifest = run.config, run.manifest
  number = int(step.removeprefix("step-"))
  lora = config["lora"]["rank"] > 0
  base = manifest.get("base", {})
  lines = [
    _front(run, "peft" if lora else "transformers"),
    f"# {config['objective'].upper()} after {number:,} of"
    f" {manifest['steps']:,} updates",
  ]
  if lora:
    lines.append(
      f"LoRA adapters for {config['model']['path']}, whose weights have"
      f" the fingerprint `{base.get('hash', 'unknown')}`. The merged model and"
      " the whole card are on branch `main` once the run is finished.\n\n"
      "```python\nimport peft\n\nmodel = peft.PeftModel.from_pretrained(\n"
      f'  base, "{run.repo}", revision="{step}"\n)\n```'
    )
  else:
    lines.append(
      "All weights at this step. The whole card is on branch `main` once the"
      " run is finished."
    )
  rows = [r for r in _rows(run.directory) if r["step"] == number]
  if rows:
    lines.append(_metrics(rows))
  return "\n\n".join([*lines, "## To reproduce", _command(manifest)]) + "\n"


def on_hub(name: str) -> bool:
  """Whether a name is user/name or user/name@revision."""
  return remote.is_repository(name.partition("@")[0])


def _rows(directory: pathlib.Path) -> list[dict[str, Any]]:
  path = directory / metrics.FILE
  return metrics.read(path) if path.is_file() else []


def _report(directory: pathlib.Path) -> pathlib.Path | None:
  """The report of the run, or of the replication that it is a stage of."""
  for parent in (directory, directory.parent):
    if (parent / "report" / "numbers.json").is_file():
      return parent / "report"
  return None


def _front(run: Run, library: str) -> str:
  """The hub's YAML. Strings are JSON's, which YAML reads too."""
  config = run.config
  values: dict[str, Any] = {
    "library_name": library,
    "pipeline_tag": "text-generation",
    "tags": ["dpo_jax", "jax", config["objective"]],
  }
  if run.licence:
    values["license"] = run.licence
  if on_hub(base := config["model"]["path"]):
    values["base_model"] = base.partition("@")[0]
  sources = config["data"]["sources"]
  read = [sources[name]["train_path"] for name in config["data"]["use"]]
  if datasets := {x.partition("@")[0] for x in read if on_hub(x)}:
    values["datasets"] = sorted(datasets)
  lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
  return "\n".join(["---", *lines, "---"])


def _where(config: Mapping[str, Any]) -> str:
  if not config["lora"]["rank"]:
    return " Branches `step-NNNNNN` hold the model after earlier updates."
  return (
    " The adapters are merged; `adapter/` holds the last ones for PEFT, and"
    " branches `step-NNNNNN` those after earlier updates."
  )


def _usage(repo: str) -> str:
  prompt = "\\n\\nHuman: ...\\n\\nAssistant:"
  return (
    "```python\nimport transformers\n\n"
    f'name = "{repo}"\n'
    "tokenizer = transformers.AutoTokenizer.from_pretrained(name)\n"
    "model = transformers.AutoModelForCausalLM.from_pretrained(name)\n"
    f'ids = tokenizer("{prompt}", return_tensors="pt")\n'
    "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))\n```"
  )


def _recipe(config: Mapping[str, Any]) -> str:
  optimizer, lora, data = config["optimizer"], config["lora"], config["data"]
  rows = [
    ("objective", config["objective"]),
    ("optimizer", optimizer["name"]),
    ("learning rate", optimizer["learning_rate"]),
    (
      "schedule",
      f"{optimizer['schedule']}, {optimizer['warmup_steps']} of warm-up",
    ),
    ("weight decay", optimizer["weight_decay"]),
    ("clipped at norm", optimizer["clip_norm"]),
    ("batch", config["batch_size"]),
    ("epochs", config["epochs"]),
    ("seed", config["seed"]),
    ("computed in", config["model"]["dtype"]),
    ("tokens of a sequence", f"{data['max_length']}, {data['profile']}"),
  ]
  if config["objective"] == "dpo":
    loss = config["loss"]
    rows[1:1] = [
      ("loss", loss["kind"]),
      ("beta", loss["beta"]),
      ("label smoothing", loss["label_smoothing"]),
    ]
  if lora["rank"]:
    rows.append(
      (
        "LoRA",
        f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout"
        f" {lora['dropout']:g}, on {', '.join(lora['targets'])}",
      )
    )
  return _table(("", ""), rows)


def _data(manifest: Mapping[str, Any]) -> str:
  rows = []
  for side in ("train", "held_out"):
    for name, source in manifest["data"][side]["sources"].items():
      counts = source["counts"]
      kept = counts.get("kept", "")
      rows.append((side.replace("_", "-"), name, kept, source["fingerprint"]))
  tokens = manifest["data"]["train"]["tokens"]
  return (
    _table(("side", "source", "pairs kept", "fingerprint of the texts"), rows)
    + f"\n\nFingerprint of the training tokens: `{tokens}`. `run/manifest.json`"
    " counts what was left out, by reason."
  )


def _last(directory: pathlib.Path) -> str:
  rows = [row for row in _rows(directory) if "eval_items" in row]
  if not rows:
    return "None were taken on held-out rows."
  step = rows[-1]["step"]
  return f"On held-out rows, after update {step}:\n\n{_metrics(rows[-1:])}"


def _metrics(rows: Iterable[Mapping[str, Any]]) -> str:
  found = [
    (key, f"{value:.4g}" if isinstance(value, float) else value)
    for row in rows
    for key, value in row.items()
    if key != "step" and not (isinstance(value, float) and math.isnan(value))
  ]
  return _table(("metric", "value"), found)


def _rates(numbers: Mapping[str, Any]) -> str:
  confidence = numbers["settings"]["confidence"]
  rows = [
    (
      rate["model"],
      f"{rate['temperature']:g}",
      rate["n"],
      f"{100 * rate['win_rate']:.1f}",
      f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]",
    )
    for rate in numbers["rates"]
    if rate["step"] is None and rate["win_rate"] is not None
  ]
  head = ("model", "T", "prompts", "win rate, %", f"{100 * confidence:g}%")
  flags = numbers.get("flags") or []
  note = (
    ""
    if not flags
    else ("\n\nThe report is flagged: a control of the judge failed.")
  )
  return _table(head, rows) + note


def _licence(licence: str) -> str:
  if not licence:
    return (
      "None was chosen for these weights. Those of the base model and of the"
      " data hold."
    )
  return f"{licence}. Those of the base model and of the data hold too."


def _command(manifest: Mapping[str, Any]) -> str:
  starts = manifest.get("starts") or [{}]
  command = starts[0].get("command", "")
  versions = ", ".join(
    f"{name} {version}" for name, version in manifest["versions"].items()
  )
  shown = f"```bash\n{command}\n```\n\n" if command else ""
  return (
    f"{shown}`run/config.json` on branch `main` has every setting. Versions:"
    f" {versions}."
  )


def _table(head: tuple, rows: Iterable[tuple]) -> str:
  cells = [[markdown.literal(str(cell)) for cell in row] for row in rows]
  return "\n".join(markdown.table(head, cells))

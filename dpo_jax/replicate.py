"""The pipeline in one command: pairs, SFT, DPO, responses, verdicts, report.

  python -m dpo_jax.replicate --config=configs/demo.py

Each stage reads and writes files in one working directory and skips work that
is done, so that the same command resumes after an interruption.
"""

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax

from dpo_jax.cli import flags
from dpo_jax.core import console, preemption, settings
from dpo_jax.data import sources
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.demo import world as world_lib
from dpo_jax.hub import push as push_lib
from dpo_jax.io import atomic, locks, rundir
from dpo_jax.judging import runner
from dpo_jax.model import gpt_neox, hf
from dpo_jax.report import report
from dpo_jax.sampling import generate, jobs
from dpo_jax.training import config as config_lib
from dpo_jax.training import train as train_lib

# Stages whose settings may change: their results are looked up by content, or
# made again. Those of any other stage are fixed once it is done.
_REPEATABLE = ("judge", "report")
_TRAININGS = ("pretrain", "sft", "dpo")


@dataclasses.dataclass(frozen=True)
class WorldSettings:
  """Sizes of the synthetic world, the arguments of `world.generate`."""

  seed: int
  pretrain: int
  train: int
  test: int
  scale: float

  def __post_init__(self):
    settings.check(self, "world.")


@dataclasses.dataclass(frozen=True)
class VocabularySettings:
  """A tokenizer trained on the texts of a comparisons file."""

  texts: str
  size: int
  directory: str


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A GPT-NeoX's shape; see configs/models.py."""

  vocab_size: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  rotary_fraction: float
  rotary_base: float
  norm_eps: float
  max_positions: int


@dataclasses.dataclass(frozen=True)
class InitSettings:
  """A model of random weights, written in Hugging Face form."""

  architecture: Architecture
  seed: int
  tokenizer: str
  directory: str

  def __post_init__(self):
    settings.check(self, "init.")


@dataclasses.dataclass(frozen=True)
class ReplicateSettings:
  """A replication; a stage that is None is left out.

  `paths` are inputs of several stages. {workdir} and {NAME}, for a name in
  `paths`, are replaced in every string of the config.
  """

  paths: dict[str, str]
  world: WorldSettings | None
  vocabulary: VocabularySettings | None
  init: InitSettings | None
  pretrain: config_lib.TrainSettings | None
  sft: config_lib.TrainSettings
  dpo: config_lib.TrainSettings
  sample: jobs.SamplingSettings
  judge: runner.JudgeSettings
  report: report.ReportSettings


def run(config: dict[str, Any], workdir: pathlib.Path) -> pathlib.Path:
  """Runs, or resumes, a replication in `workdir`; returns the report's path.

  `config` holds the values of a ReplicateSettings, placeholders not replaced.

  Raises:
    ValueError: a value or an input is wrong; nothing is lost.
  """
  started = time.perf_counter()
  here = {"workdir": str(workdir)}
  paths = here | _filled(config["paths"], here)
  built = settings.build(ReplicateSettings, _filled(config, paths))
  workdir.mkdir(parents=True, exist_ok=True)
  with locks.Lock(workdir / "lock"):
    done = rundir.begun(workdir)
    free = [
      f"{name}.{field}" for name in _TRAININGS for field in config_lib.FREE
    ]
    rundir.check(workdir, {name: config.get(name) for name in done}, free)
    stages = [
      (name, stage)
      for name, stage in _stages(built, workdir).items()
      if getattr(built, name) is not None
    ]
    for number, (name, stage) in enumerate(stages, 1):
      console.say(f"[{number}/{len(stages)}] {name}", "stage", stage=name)
      try:
        stage()
      except push_lib.NotPushed as error:
        # It is tried again after the last stage.
        console.say(str(error), "not_pushed", stage=name)
      if name not in _REPEATABLE:
        done[name] = config[name]
        text = json.dumps(done, indent=2)
        atomic.write_text(workdir / "config.json", text + "\n")
    _push(built, workdir)
  minutes = (time.perf_counter() - started) / 60
  path = workdir / "report" / "report.md"
  console.result(
    f"{path} after {minutes:.1f} minutes", path=str(path), minutes=minutes
  )
  return path


def _stages(
  built: ReplicateSettings, workdir: pathlib.Path
) -> dict[str, Callable[[], Any]]:
  """The call of each stage, in order."""

  def train(name):
    return train_lib.run(getattr(built, name), workdir / name, workdir)

  return {
    "world": lambda: _world(built.world, workdir / "world"),
    "vocabulary": lambda: _vocabulary(built.vocabulary),
    "init": lambda: _init(built.init),
    "pretrain": lambda: train("pretrain"),
    "sft": lambda: train("sft"),
    "dpo": lambda: train("dpo"),
    "sample": lambda: generate.run(built.sample, workdir),
    "judge": lambda: runner.run(built.judge, workdir),
    "report": lambda: report.write(built.report, workdir),
  }


def _push(built: ReplicateSettings, workdir: pathlib.Path) -> None:
  """Pushes what failed, and the cards again, with win rates.

  Raises:
    hub.NotPushed: something could not be pushed.
  """
  failed = []
  for name in _TRAININGS:
    stage = getattr(built, name)
    if stage is not None and (push := stage.push()):
      try:
        push_lib.push(push, workdir / name)
      except push_lib.NotPushed as error:
        failed.append(str(error))
  if failed:
    raise push_lib.NotPushed("\n".join(failed))


def _world(config: WorldSettings, directory: pathlib.Path) -> None:
  def write(staged):
    world = world_lib.generate(**dataclasses.asdict(config))
    world_lib.write(world, staged)

  _once(directory, write)


def _vocabulary(config: VocabularySettings) -> None:
  def write(staged):
    rows = sources.read_file(config.texts).rows
    texts = (
      text for row in rows for text in (row.prompt, row.chosen, row.rejected)
    )
    tokenizer_lib.train(texts, config.size, staged)

  _once(pathlib.Path(config.directory), write)


def _init(config: InitSettings) -> None:
  if pathlib.Path(config.directory).exists():
    return
  shape = gpt_neox.ModelConfig(**dataclasses.asdict(config.architecture))
  make = jax.jit(gpt_neox.init, static_argnums=0)
  base = make(shape, jax.random.key(config.seed))
  tokenizer = tokenizer_lib.load(config.tokenizer)
  hf.export(config.directory, shape, base, tokenizer)


def _once(
  directory: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Makes a directory atomically unless it exists."""
  if directory.exists():
    return
  staged = directory.with_name(directory.name + ".part")
  shutil.rmtree(staged, ignore_errors=True)
  staged.mkdir(parents=True)
  write(staged)
  staged.rename(directory)


def _filled(values: Any, paths: dict[str, str]) -> Any:
  """`values` with {NAME} replaced in every string, for every path's name."""
  if isinstance(values, dict):
    return {key: _filled(value, paths) for key, value in values.items()}
  if isinstance(values, list | tuple):
    return tuple(_filled(value, paths) for value in values)
  if isinstance(values, str):
    for name, path in paths.items():
      values = values.replace("{" + name + "}", path)
  return values


def main(config: dict[str, Any], workdir: pathlib.Path) -> int:
  with preemption.interruptible():
    run(config, workdir)
  return 0


if __name__ == "__main__":
  flags.run(main, example="configs/demo.py")

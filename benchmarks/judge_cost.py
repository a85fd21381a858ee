"""What judging a figure will cost, by the judge's own estimate: asks nothing.

  python -m benchmarks.judge_cost --data=DIR_OF_HH --cells=12 --prompts=150

Writes rows in which HH's rejected answers stand for those of a model, for the
first prompts of harmless-base's test split and so many pairs of a model and a
temperature, in a temporary folder; then prints the estimate that `judge.py`
makes of them before its first call, for each model of configs/judge.py whose
price is there.
"""

import argparse
import dataclasses
import pathlib
import tempfile

from configs import data, judge
from dpo_jax.core import settings
from dpo_jax.data import sources
from dpo_jax.io import jsonl, records
from dpo_jax.judging import runner


def rows(path: str, prompts: int, cells: int) -> list[records.Response]:
  """Answers of one model, at temperatures that only tell the cells apart."""
  source = data.hh(path)
  source.subsets = ("harmless-base",)
  loaded = sources.load(
    settings.build(sources.SourceSettings, source.to_dict()),
    "eval",
    settings.build(sources.FilterSettings, data.filters().to_dict()),
    prompts,
  )
  return [
    records.Response(
      prompt_id=pair.id,
      prompt=pair.prompt,
      # A text of its own in each cell: equal questions are asked once.
      response=pair.rejected + " " * cell,
      chosen=pair.chosen,
      model="dpo",
      step=None,
      temperature=float(1 + cell),
      top_k=0,
      top_p=1.0,
      max_new_tokens=256,
      seed=0,
      sample_id=0,
      token_count=1,
      finish_reason="eos",
    )
    for cell in range(cells)
    for pair in loaded.rows
  ]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--data", required=True, help="HH, in its own layout")
  parser.add_argument("--prompts", type=int, default=150)
  parser.add_argument("--cells", type=int, default=12)
  options = parser.parse_args()
  found = rows(options.data, options.prompts, options.cells)
  config = judge.get_config("openai")
  asked = settings.build(runner.JudgeSettings, config.to_dict())
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)
    path = workdir / "responses" / "dpo.jsonl"
    with jsonl.Store(path, records.Response) as store:
      store.append_many(found)
    for price in asked.server.prices:
      server = dataclasses.replace(asked.server, model=price.split()[0])
      print(server.model, "-", end=" ")
      print(runner.estimate(dataclasses.replace(asked, server=server), workdir))


if __name__ == "__main__":
  main()

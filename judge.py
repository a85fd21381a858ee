"""Judges sampled responses against the dataset's chosen ones.

  python judge.py --config=configs/judge.py:openai --workdir=runs/demo

reads <workdir>/responses/*.jsonl and writes <workdir>/verdicts/*.jsonl. The
same command resumes: only questions without an answer are asked.
"""

import dataclasses

from dpo_jax import cli, console, settings
from dpo_jax.judging import runner


def main(config, workdir) -> int:
  summary = runner.run(settings.build(runner.JudgeSettings, config), workdir)
  console.result(str(summary), **dataclasses.asdict(summary))
  return 0


if __name__ == "__main__":
  cli.run(main, example="configs/judge.py:openai")

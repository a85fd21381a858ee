"""Judges sampled responses against the dataset's chosen ones.

  python judge.py --config=configs/judge.py:openai --workdir=runs/demo

reads <workdir>/responses/*.jsonl and writes <workdir>/verdicts/*.jsonl. The
same command resumes: only questions without an answer are asked.
"""

from dpo_jax import cli, settings
from dpo_jax.judging import runner


def main(config, workdir) -> int:
  print(runner.run(settings.build(runner.JudgeSettings, config), workdir))
  return 0


if __name__ == "__main__":
  cli.run(main)

"""Judges sampled responses against the dataset's chosen responses.

  python judge.py --config=configs/judge.py:openai --workdir=runs/demo

reads <workdir>/responses/*.jsonl and writes <workdir>/verdicts/*.jsonl. The
same command resumes: a question is paid for once. --estimate prints calls,
tokens and dollars without a request.
"""

import dataclasses

from dpo_jax.cli import flags
from dpo_jax.core import console, preemption, settings
from dpo_jax.judging import runner


def main(config, workdir, estimate: bool) -> int:
  built = settings.build(runner.JudgeSettings, config)
  if estimate:
    found = runner.estimate(built, workdir)
    console.result(str(found), "estimate", **dataclasses.asdict(found))
    return 0
  with preemption.interruptible():
    runner.run(built, workdir)
  return 0


if __name__ == "__main__":
  flags.run(
    main,
    example="configs/judge.py:openai",
    estimate=(False, "print calls, tokens and dollars; send no request"),
  )

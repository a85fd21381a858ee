"""Verdicts a second of the whole judging run, through HTTP to a local server.

  python -m benchmarks.judge_throughput

starts the fake judge server in a process of its own, judges freshly made
responses against it, and prints the rate: pages, requests, replies, rows
flushed to disk, all included, start of the process excluded.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

from configs import judge
from dpo_jax import records
from dpo_jax.interface import settings
from dpo_jax.judging import runner
from dpo_jax.storage import row_store


def response(number: int, words: int) -> records.Response:
  return records.Response(
    prompt_id=f"p{number}",
    prompt=f"\n\nHuman: {'what about this ' * 20}{number}?\n\nAssistant:",
    response=" " + f"an answer {number} " * (words // 3),
    chosen=" " + "the chosen one " * (words // 3),
    model="dpo",
    step=None,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=256,
    seed=0,
    sample_id=0,
    token_count=words,
    finish_reason="eos",
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--prompts", type=int, default=2000, help="two verdicts each")
  add("--words", type=int, default=60, help="of each compared text")
  add("--concurrency", type=int, default=64)
  add("--latency-s", type=float, default=0.05, help="of the server")
  arguments = parser.parse_args()
  command = [sys.executable, "-m", "dpo_jax.judging.fake_server"]
  latency = f"--latency-s={arguments.latency_s}"
  with (
    tempfile.TemporaryDirectory() as name,
    subprocess.Popen(
      [*command, latency], stdout=subprocess.PIPE, text=True
    ) as server,
  ):
    try:
      workdir = pathlib.Path(name)
      path = workdir / "responses" / "dpo.jsonl"
      with row_store.Store(path, records.Response) as store:
        store.append_many(
          response(number, arguments.words)
          for number in range(arguments.prompts)
        )
      config = judge.get_config("local")
      config.concurrency = arguments.concurrency
      assert server.stdout is not None
      config.server.base_url = server.stdout.readline().strip()
      built = settings.build(runner.JudgeSettings, config.to_dict())
      begin, cpu = time.perf_counter(), time.process_time()
      summary = runner.run(built, workdir)
      wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    finally:
      server.terminate()
  assert summary.complete, summary
  print(
    f"{summary.asked} verdicts in {wall:.2f} s: {summary.asked / wall:.0f} a"
    f" second; {1e3 * cpu / summary.asked:.2f} ms of processor time each"
  )


if __name__ == "__main__":
  main()

"""Verdicts a second of the whole judging run, through HTTP to a local server.

  python -m benchmarks.judge_throughput

starts a server that gives every question the same reply, in a process of its
own, judges freshly made responses against it, and prints the rate: pages,
requests, replies, rows flushed to disk, all included, start of the process
excluded.
"""

import argparse
import asyncio
import json
import multiprocessing
import pathlib
import tempfile
import time

from configs import judge
from dpo_jax.core import settings
from dpo_jax.io import jsonl, records
from dpo_jax.judging import runner

REPLY = {
  "choices": [
    {
      "finish_reason": "stop",
      "message": {"content": "Comparison: alike.\nMore helpful: A"},
    }
  ],
  "model": "judge-as-served",
  "usage": {"prompt_tokens": 400, "completion_tokens": 20},
}


def serve(latency_s: float, told) -> None:
  """Serves `REPLY` until it is ended; sends the port through `told`."""
  body = json.dumps(REPLY).encode()
  head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
  answer = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

  async def converse(reader, writer) -> None:
    try:
      while True:
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        size = next(n for n in lines if n.startswith(b"content-length:"))
        await reader.readexactly(int(size.partition(b":")[2]))
        await asyncio.sleep(latency_s)
        writer.write(answer)
    except asyncio.IncompleteReadError:
      writer.close()

  async def listen() -> None:
    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    told.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()

  asyncio.run(listen())


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
  spawn = multiprocessing.get_context("spawn")
  receiver, sender = spawn.Pipe(duplex=False)
  server = spawn.Process(
    target=serve, args=(arguments.latency_s, sender), daemon=True
  )
  server.start()
  config = judge.get_config("local")
  config.concurrency = arguments.concurrency
  config.server.base_url = f"http://127.0.0.1:{receiver.recv()}/v1"
  built = settings.build(runner.JudgeSettings, config.to_dict())
  with tempfile.TemporaryDirectory() as name:
    workdir = pathlib.Path(name)
    path = workdir / "responses" / "dpo.jsonl"
    with jsonl.Store(path, records.Response) as store:
      store.append_many(
        response(number, arguments.words) for number in range(arguments.prompts)
      )
    begin, cpu = time.perf_counter(), time.process_time()
    summary = runner.run(built, workdir)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
  server.terminate()
  assert summary.complete, summary
  print(
    f"{summary.asked} verdicts in {wall:.2f} s: {summary.asked / wall:.0f} a"
    f" second; {1e3 * cpu / summary.asked:.2f} ms of processor time each"
  )


if __name__ == "__main__":
  main()

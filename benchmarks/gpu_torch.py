"""The same answers by transformers' generate or by vLLM, for gpu.py.

Imports nothing of dpo_jax, and is run by the Python of an environment that has
the one or the other. Model and prompts are those that gpu_case.py wrote. Each
row draws at temperature 1 and does not end before its last token; one wave
warms up, and three are timed.
"""

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import time


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--case", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--engine", choices=("generate", "vllm"), required=True)
  # Of generate's keys and values; "static" compiles the step.
  parser.add_argument("--cache", choices=("dynamic", "static"))
  parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
  flags = parser.parse_args()
  asked = json.loads((flags.case / "prompts.json").read_text())
  make = {"generate": generate, "vllm": vllm}[flags.engine]
  wave, versions = make(flags, asked["prompts"], asked["new_tokens"])
  wave()
  times, tokens = [], 0
  for _ in range(3):
    started = time.perf_counter()
    tokens = wave()
    times.append(time.perf_counter() - started)
  found = {
    "tokens": tokens,
    "tokens_per_second": tokens / statistics.median(times),
    "seconds": times,
    "versions": {name: importlib.metadata.version(name) for name in versions},
  }
  flags.output.write_text(json.dumps(found))


def generate(flags, prompts, new):
  """All rows as one batch, padded on the left."""
  import torch
  import transformers

  device = "cuda" if flags.device == "gpu" else "cpu"
  network = transformers.AutoModelForCausalLM.from_pretrained(
    flags.case / "model", dtype=torch.bfloat16
  )
  network = network.to(device).eval()
  longest = max(map(len, prompts))
  left = [longest - len(p) for p in prompts]
  ids = [[0] * pad + list(p) for pad, p in zip(left, prompts)]
  mask = [[0] * pad + [1] * len(p) for pad, p in zip(left, prompts)]
  ids, mask = (torch.tensor(x, device=device) for x in (ids, mask))
  static = {"cache_implementation": "static"} if flags.cache == "static" else {}

  def wave():
    with torch.inference_mode():
      out = network.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        **static,
      )
    # Reading them waits for the device.
    return out[:, longest:].cpu().numel()

  return wave, ("torch", "transformers")


def vllm(flags, prompts, new):
  """All rows at once, as vLLM schedules them, with its own settings."""
  import vllm

  engine = vllm.LLM(
    model=str(flags.case / "model"),
    dtype="bfloat16",
    max_num_seqs=len(prompts),
    # The same prompts come again: none may be remembered.
    enable_prefix_caching=False,
  )
  how = vllm.SamplingParams(
    temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False
  )
  rows = [{"prompt_token_ids": list(p)} for p in prompts]

  def wave():
    done = engine.generate(rows, how, use_tqdm=False)
    return sum(len(one.outputs[0].token_ids) for one in done)

  return wave, ("torch", "vllm")


if __name__ == "__main__":
  main()

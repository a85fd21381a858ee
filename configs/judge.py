"""Who judges the responses, and how they are asked.

  python judge.py --config=configs/judge.py:VARIANT --workdir=DIR

Reads DIR/responses, writes DIR/verdicts; needs no accelerator. Variants:

- oracle: the true reward of the synthetic world. Free; 12,000 verdicts take
  a few seconds. Only for responses to that world's prompts.
- openai: gpt-4o-mini over OpenAI's API, OPENAI_API_KEY in the environment.
  150 prompts at 4 temperatures for 3 models are 3,600 questions in both
  orders: six minutes at 16 in flight if a reply takes 1.6 s, longer under a
  rate limit. The paper's judge was gpt-4-0314, which is no longer served.
- local: any OpenAI-compatible server on this machine, such as vLLM or
  llama.cpp, without a key.
"""

import ml_collections


def _server(**values) -> ml_collections.ConfigDict:
  server = ml_collections.ConfigDict()
  # Of the API, up to and without /chat/completions.
  server.base_url = values["base_url"]
  # Name of the environment variable that holds the key; "" sends none.
  server.api_key_env = values["api_key_env"]
  # Pinned: a dated name, where the server has one. Part of a verdict's key.
  server.model = values["model"]
  # The judge's own sampling; 0 is the most repeatable. Part of the key.
  server.temperature = 0.0
  # Room for one sentence and the verdict; a cut reply is a missing verdict.
  server.max_tokens = 256
  # Of one request.
  server.timeout_s = values["timeout_s"]
  # Further requests after 429, 5xx, a timeout or a lost connection.
  server.max_retries = 5
  # First wait when the server names none; doubles with each retry.
  server.retry_wait_s = 0.5
  # All waits of one request together; beyond it the verdict is missing.
  server.max_wait_s = 120.0
  # File with {prompt}, {first} and {second}; "" is the built-in dialogue one.
  server.template = ""
  return server


def get_config(variant: str = "oracle") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  # "server": a model behind an OpenAI-compatible server. "oracle": the world's.
  config.kind = "oracle" if variant == "oracle" else "server"
  # "both": every pair twice, each text first once. "random": one drawn order,
  # as in the paper; half the calls, but a judge's taste for a slot stays in.
  config.orders = "both"
  # Of the drawn orders.
  config.seed = 0
  # Questions in flight at a time.
  config.concurrency = 16
  if variant == "oracle":
    config.concurrency = 64
    config.server = None
  elif variant == "openai":
    config.server = _server(
      base_url="https://api.openai.com/v1",
      api_key_env="OPENAI_API_KEY",
      model="gpt-4o-mini-2024-07-18",
      timeout_s=60.0,
    )
  elif variant == "local":
    config.server = _server(
      base_url="http://localhost:8000/v1",
      api_key_env="",
      model="Qwen/Qwen2.5-7B-Instruct",
      timeout_s=300.0,
    )
  else:
    raise ValueError(f"variant {variant!r} must be oracle, openai or local")
  return config

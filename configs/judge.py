"""The judge, its server and its questions.

  python judge.py --config=configs/judge.py:VARIANT --workdir=DIR

Reads DIR/responses, writes DIR/verdicts; needs no accelerator. Variants:

- oracle: the true reward of the synthetic world, on whose prompts only it
  works. Free; 12,000 verdicts take a few seconds.
- length: the longer text wins. Free, for any prompts: a test of the pipeline
  without a server, whose verdicts mean nothing.
- openai: gpt-4o-mini over OpenAI's API, OPENAI_API_KEY in the environment.
  150 prompts at 4 temperatures for 3 models are 3,600 questions in both
  orders: six minutes at concurrency 16 if a reply takes 1.6 s, longer under a
  rate limit. The paper's judge, gpt-4-0314, is no longer served.
  --config.server.mode=batch uses the Batch API instead.
- local: any OpenAI-compatible server on this machine, such as vLLM or
  llama.cpp, without a key.
"""

import ml_collections

# Dollars per million tokens, "MODEL PROMPT COMPLETION": list prices, which
# change; look them up before you rely on a budget. A budget is refused for a
# model without an entry.
PRICES = (
  "gpt-4o-mini-2024-07-18 0.15 0.60",
  "gpt-4o-2024-08-06 2.50 10.00",
)


def _server(**values) -> ml_collections.ConfigDict:
  server = ml_collections.ConfigDict()
  # URL of the API, without /chat/completions. With ?api-version=, as Azure has
  # it, the key is sent as Azure's api-key.
  server.base_url = values["base_url"]
  # Name of the environment variable with the key; "" sends none.
  server.api_key_env = values["api_key_env"]
  # Sends the key over http:// to hosts other than this machine.
  server.allow_http = False
  # Pinned: a dated name where the server has one. Part of a verdict's key.
  server.model = values["model"]
  # The judge's own sampling; 0 is the most repeatable. Part of the key.
  server.temperature = 0.0
  # Enough for one sentence and the verdict; a cut reply is a missing verdict.
  server.max_tokens = 256
  # Its name in a request: "max_tokens", which every server knows, or
  # "max_completion_tokens", which newer OpenAI models require.
  server.max_tokens_name = "max_tokens"
  # Parameters to leave out, for models that refuse them: "temperature",
  # "max_tokens", or both. Part of the key.
  server.omit = ()
  # dialogue, harmlessness, summary or summary-concise; or a file with
  # {prompt}, {first} and {second}, and {ending} for the form of the reply.
  server.template = "dialogue"
  # "text": the last line is the verdict. "json_schema": constrained decoding,
  # for servers that support it; there is no fallback.
  server.output = "text"
  # True: the judge may call a tie, which counts half.
  server.ties = False
  # Log-probs of this many alternatives per token, up to 20, from which a
  # verdict's score, the judge's own probability, is computed; 0 for none.
  server.top_logprobs = 0
  # "live": one request per question. "batch": the Batch API, within a day.
  server.mode = "live"
  # Deadline of one request, up to the last byte of its reply.
  server.timeout_s = values["timeout_s"]
  # Retries after 429, 5xx, a timeout or a lost connection; in batch mode,
  # further batches for what expired or failed.
  server.max_retries = 5
  # First wait without a Retry-After header; doubles with each retry.
  server.retry_wait_s = 0.5
  # All waits of one request together; beyond it the verdict is missing. A
  # single Retry-After beyond it ends the run.
  server.max_wait_s = 120.0
  # Rate cap, evenly spaced; 0 for none. Retry-After is respected anyway.
  server.requests_per_minute = 0.0
  # Dollars for this directory of verdicts, earlier runs included; 0 for no
  # cap. Each call in flight reserves an upper bound of its cost.
  server.budget_usd = 0.0
  # Dollars per million tokens, "MODEL PROMPT COMPLETION"; a batch costs half.
  server.prices = PRICES
  # Between two polls of a batch.
  server.batch_poll_s = 30.0
  return server


def get_config(variant: str = "oracle") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  # "server": a model behind an OpenAI-compatible server. Or a reward, computed
  # in this process, whose higher value wins: "oracle", the synthetic world's
  # true one, or "length", the number of characters.
  config.kind = variant if variant in ("oracle", "length") else "server"
  # "both": every pair twice, each text first once. "random": one random order,
  # as in the paper; half the calls, but with the judge's position bias.
  config.orders = "both"
  # Of the random orders and of the controls' samples.
  config.seed = 0
  # Requests in flight.
  config.concurrency = 16
  # Directory of the verdicts; another one, verdicts-NAME, for each further
  # criterion, such as verdicts-harmlessness.
  config.verdicts = "verdicts"
  # Questions that measure the judge itself.
  config.controls = ml_collections.ConfigDict()
  # Prompts whose chosen text is compared with itself: position bias.
  config.controls.aa = 50
  # Prompts whose chosen text is compared with another prompt's: accuracy.
  config.controls.gold = 50
  # Ordinary questions asked again: consistency.
  config.controls.retests = 50
  if config.kind != "server":
    config.concurrency = 64
    # A reward has none.
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
    raise ValueError(
      f"variant {variant!r} must be oracle, length, openai or local"
    )
  return config

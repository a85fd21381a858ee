"""Who judges the responses, and how they are asked.

  python judge.py --config=configs/judge.py:VARIANT --workdir=DIR

Reads DIR/responses, writes DIR/verdicts; needs no accelerator. Variants:

- oracle: the true reward of the synthetic world. Free; 12,000 verdicts take
  a few seconds. Only for responses to that world's prompts.
- length: the longer text wins. Free, for any prompts and without a server: it
  shows that a run goes through, and its verdicts mean nothing.
- openai: gpt-4o-mini over OpenAI's API, OPENAI_API_KEY in the environment.
  150 prompts at 4 temperatures for 3 models are 3,600 questions in both
  orders: six minutes at 16 in flight if a reply takes 1.6 s, longer under a
  rate limit. The paper's judge was gpt-4-0314, which is no longer served.
  --config.server.mode=batch asks through the Batch API instead.
- local: any OpenAI-compatible server on this machine, such as vLLM or
  llama.cpp, without a key.
"""

import ml_collections

# Dollars for a million tokens, "MODEL PROMPT COMPLETION": list prices, which
# change; look them up before a budget rests on them. Another model needs its
# own entry, or a budget is refused.
PRICES = (
  "gpt-4o-mini-2024-07-18 0.15 0.60",
  "gpt-4o-2024-08-06 2.50 10.00",
)


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
  # What a request calls it: "max_tokens", which every server knows, or
  # "max_completion_tokens", which newer OpenAI models want.
  server.max_tokens_name = "max_tokens"
  # dialogue, harmlessness, summary or summary-concise; or a file with
  # {prompt}, {first} and {second}, and {ending} for how to answer.
  server.template = "dialogue"
  # "text": the last line holds the verdict. "json_schema": the server holds
  # the reply to a schema; one that cannot refuses, nothing else is tried.
  server.output = "text"
  # True: the judge may call a tie, which counts half.
  server.ties = False
  # Alternatives to each token of the reply, 1 to 20, from which a verdict's
  # score, the judge's own probability, is read; 0 asks for none.
  server.top_logprobs = 0
  # "live": one request a question. "batch": the Batch API, within a day.
  server.mode = "live"
  # Deadline of one request, to the last byte of its answer.
  server.timeout_s = values["timeout_s"]
  # Further requests after 429, 5xx, a timeout or a lost connection; further
  # batches for what expired or failed.
  server.max_retries = 5
  # First wait when the server names none; doubles with each retry.
  server.retry_wait_s = 0.5
  # All waits of one request together; beyond it the verdict is missing. A
  # single longer wait that the server asks of everybody ends the run.
  server.max_wait_s = 120.0
  # Caps, evenly spaced; 0 for none. Retry-After is kept in any case.
  server.requests_per_minute = 0.0
  # As requests_per_minute.
  server.tokens_per_minute = 0.0
  # Dollars for this directory of verdicts, earlier runs included; 0 for no
  # cap. Calls in flight are reserved at the most that they could cost.
  server.budget_usd = 0.0
  # Dollars for a million tokens, "MODEL PROMPT COMPLETION".
  server.prices = PRICES
  # Share of the price that a token costs in batch mode.
  server.batch_price = 0.5
  # Most questions in one batch.
  server.batch_size = 10000
  # Between two looks at a batch.
  server.batch_poll_s = 30.0
  # What a reply takes, for the estimate before the first call only.
  server.expected_reply_tokens = 60
  # Seconds, likewise.
  server.expected_reply_s = 1.6
  return server


def get_config(variant: str = "oracle") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  # "server": a model behind an OpenAI-compatible server. Or a reward that is
  # computed here, of which the higher wins: "oracle", the synthetic world's
  # true one, or "length", the characters of any text.
  config.kind = variant if variant in ("oracle", "length") else "server"
  # "both": every pair twice, each text first once. "random": one drawn order,
  # as in the paper; half the calls, but a judge's taste for a slot stays in.
  config.orders = "both"
  # Of the drawn orders and of the controls' samples.
  config.seed = 0
  # Most questions in flight at a time; fewer while the server complains.
  config.concurrency = 16
  # Directory beside responses/: another one, verdicts-NAME, for each further
  # criterion, such as verdicts-harmlessness.
  config.verdicts = "verdicts"
  # Questions about the judge itself.
  config.controls = ml_collections.ConfigDict()
  # Prompts whose chosen text is compared with itself: is a slot preferred?
  config.controls.aa = 50
  # Prompts whose chosen text is compared with another prompt's: is it right?
  config.controls.gold = 50
  # Ordinary questions asked once more: is it consistent?
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

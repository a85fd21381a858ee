"""Where a judge behind an OpenAI-compatible server is, and how it is asked."""

import dataclasses
import json
import math
import os
import re
import urllib.parse
from typing import Literal

from dpo_jax.judging import budget, prompts, replies


@dataclasses.dataclass(frozen=True)
class ServerSettings:
  """Where and how to ask.

  Attributes:
    base_url: of the API, such as https://api.openai.com/v1.
    api_key_env: name of the environment variable that holds the key; "" for a
      server that wants none. The key itself is never written anywhere.
    model: pinned name of the judging model, as the server knows it.
    temperature: of the judge's own sampling; 0 for the most repeatable one.
    max_tokens: cap on a reply.
    max_tokens_name: what a request calls that cap; newer OpenAI models refuse
      the older name.
    template: a built-in template by name (`templates.BUILT_IN`), or a file.
    output: "text", or "json_schema" for servers that hold a reply to a schema;
      a server that does not know it refuses, and nothing else is tried.
    ties: whether the judge may call a tie.
    top_logprobs: alternatives to ask for at each token, from which a verdict's
      score is made; 0 asks for none.
    mode: "live", one request a question, or "batch", the Batch API.
    timeout_s: deadline of one request, from its first byte to its answer's
      last.
    max_retries: further requests after a failure of the server; in batch mode
      further batches.
    retry_wait_s: first wait, doubled with each retry, if the server names none.
    max_wait_s: cap on all the waits of one request together.
    requests_per_minute: cap; 0 for none.
    tokens_per_minute: cap, prompt and reply together; 0 for none.
    budget_usd: cap on the dollars spent on one directory of verdicts, earlier
      runs included; 0 for none.
    prices: "MODEL PROMPT COMPLETION" each, in dollars for a million tokens.
    batch_price: what a token costs in batch mode, as a share of its price.
    batch_size: most questions in one batch.
    batch_poll_s: between two looks at a batch.
    expected_reply_tokens: of one reply, for the estimate only.
    expected_reply_s: from request to reply, for the estimate only.
  """

  base_url: str
  api_key_env: str
  model: str
  temperature: float
  max_tokens: int
  max_tokens_name: Literal["max_tokens", "max_completion_tokens"]
  template: str
  output: replies.Output
  ties: bool
  top_logprobs: int
  mode: Literal["live", "batch"]
  timeout_s: float
  max_retries: int
  retry_wait_s: float
  max_wait_s: float
  requests_per_minute: float
  tokens_per_minute: float
  budget_usd: float
  prices: tuple[str, ...]
  batch_price: float
  batch_size: int
  batch_poll_s: float
  expected_reply_tokens: int
  expected_reply_s: float

  def __post_init__(self):
    if not self.base_url.startswith(("http://", "https://")):
      raise ValueError(
        f"base_url={self.base_url!r} must start with http:// or https://"
      )
    if urllib.parse.urlsplit(self.base_url).username is not None:
      raise ValueError(
        "base_url holds a user or key before its '@': leave it out, and name"
        " the environment variable with the key in api_key_env"
      )
    # Not shown: whoever gives the key itself should not find it in a log.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}|", self.api_key_env):
      raise ValueError(
        "api_key_env must be the name of an environment variable, in capitals,"
        " digits and '_', not a key; '' is for a server that wants none"
      )
    if not self.model:
      raise ValueError("model='' must name the judging model")
    for name in ("max_tokens", "timeout_s", "batch_size", "batch_poll_s"):
      self._require(name, getattr(self, name) > 0, "positive")
    for name in (
      *("temperature", "max_retries", "retry_wait_s", "max_wait_s"),
      *("requests_per_minute", "tokens_per_minute", "budget_usd"),
      *("batch_price", "expected_reply_tokens", "expected_reply_s"),
    ):
      self._require(name, getattr(self, name) >= 0, "zero or more")
    if not 0 <= self.top_logprobs <= 20:
      raise ValueError(f"top_logprobs={self.top_logprobs} must be 0 to 20")
    prices = budget.read_prices(self.prices)
    if self.budget_usd and self.model not in prices:
      raise ValueError(
        f"budget_usd={self.budget_usd:g} cannot be kept: the price of"
        f" {self.model!r} is not in prices; add it, or set budget_usd=0"
      )

  def _require(self, name: str, holds: bool, what: str) -> None:
    value = getattr(self, name)
    if not (holds and math.isfinite(value)):
      raise ValueError(f"{name}={value} must be {what} and finite")

  @property
  def price(self) -> budget.Price | None:
    """Of a token of this model in this mode; None if it is not known."""
    price = budget.read_prices(self.prices).get(self.model)
    if price is None:
      return None
    factor = self.price_factor
    return budget.Price(factor * price.prompt, factor * price.completion)

  @property
  def price_factor(self) -> float:
    return self.batch_price if self.mode == "batch" else 1.0

  @property
  def parameters(self) -> str:
    """All of these that a reply depends on, but for model and template."""
    names = ("temperature", "max_tokens", "output", "ties", "top_logprobs")
    return json.dumps({name: getattr(self, name) for name in names})

  def load_template(self) -> prompts.Template:
    """ValueError if there is none of that name, or it cannot be used."""
    return prompts.load(self.template, output=self.output, ties=self.ties)

  def read_key(self) -> str:
    """The key from the environment; ValueError without it if it is no key."""
    variable = self.api_key_env
    if not variable:
      return ""
    key = os.environ.get(variable, "").strip()
    if not key:
      raise ValueError(
        f"the environment variable {variable} is not set: export the server's"
        " key in it, or set api_key_env='' for a server that wants none"
      )
    if not (key.isascii() and key.isprintable()):
      raise ValueError(
        f"the environment variable {variable} holds characters that cannot be"
        " part of a key"
      )
    return key

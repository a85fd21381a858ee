"""Requests, retries and waits of the client, and every fault of a server."""

import asyncio
import dataclasses
import email.utils
import math
import time

import judge_server
import pytest

from dpo_jax import judging
from dpo_jax.judging import client, prompts

NOWHERE = "http://127.0.0.1:9/v1"
KEY = "sk-planted-0123456789"
QUESTION = judging.Question("\n\nHuman: hi\n\nAssistant:", " longer", " no")
TEMPLATE = prompts.load("dialogue", output="text", ties=False)
GOOD = judge_server.says("Comparison: x.\nMore helpful: B")


def settings(url, **changes) -> client.ServerSettings:
  values = {
    "base_url": url,
    "api_key_env": "",
    "allow_http": False,
    "model": "judge-as-asked",
    "temperature": 0.0,
    "max_tokens": 64,
    "max_tokens_name": "max_tokens",
    "omit": (),
    "template": "dialogue",
    "output": "text",
    "ties": False,
    "top_logprobs": 0,
    "mode": "live",
    "timeout_s": 20.0,
    "max_retries": 2,
    "retry_wait_s": 0.001,
    "max_wait_s": 5.0,
    "requests_per_minute": 0.0,
    "budget_usd": 0.0,
    "prices": (),
    "batch_poll_s": 0.01,
  }
  return client.ServerSettings(**(values | changes))


def ask(used, questions=(QUESTION,)) -> list[judging.Reply]:
  async def go():
    async with client.Client(used) as judge:
      return await asyncio.gather(*map(judge.ask, questions))

  return asyncio.run(go())


# --- requests


def test_a_request_carries_the_prompt_and_the_settings(monkeypatch):
  monkeypatch.setenv("MY_JUDGE_KEY", KEY + "\n")
  with judge_server.Server(judge_server.prefer_longer) as server:
    used = settings(server.url, api_key_env="MY_JUDGE_KEY", temperature=0.5)
    (reply,) = ask(used)
    ask(settings(server.url, max_tokens_name="max_completion_tokens"))
    ask(settings(server.url, omit=("max_tokens",)))
    ask(settings(server.url, omit=("temperature", "max_tokens")))
  request, other, *fewer = server.requests
  assert request.headers["authorization"] == f"Bearer {KEY}"
  page = prompts.fill(TEMPLATE, QUESTION)
  body = {
    "model": "judge-as-asked",
    "messages": [{"role": "user", "content": page}],
    "temperature": 0.5,
  }
  assert request.body == body | {"max_tokens": 64}
  assert other.body == body | {"temperature": 0, "max_completion_tokens": 64}
  assert fewer[0].body == body | {"temperature": 0}
  assert fewer[1].body.keys() == {"model", "messages"}
  assert reply == judging.Reply(
    choice="first",
    text="Comparison: one is better.\nMore helpful: A",
    model="judge-as-served",
    error="",
    fingerprint="fp_fake",
    # A quarter of the bytes, as the server counts; 42 characters of reply.
    prompt_tokens=-(-len(page) // 4),
    completion_tokens=11,
  )


@pytest.mark.parametrize("ties", [False, True])
def test_a_schema_and_logprobs_are_asked_for_and_read(ties):
  rule = judge_server.always("tie" if ties else "B")
  with judge_server.Server(rule) as server:
    used = settings(server.url, output="json_schema", ties=ties, top_logprobs=5)
    (reply,) = ask(used)
  body = server.requests[0].body
  schema = body["response_format"]["json_schema"]
  assert body["response_format"]["type"] == "json_schema"
  assert schema["strict"] is True
  assert list(schema["schema"]["properties"]) == ["comparison", "choice"]
  choices = schema["schema"]["properties"]["choice"]["enum"]
  assert choices == (["A", "B", "tie"] if ties else ["A", "B"])
  assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
  assert reply.choice == ("tie" if ties else "second")
  # 0.9 for the choice, 0.1 for A.
  assert reply.score == pytest.approx(0.1 + 0.45 if ties else 0.1)


@pytest.mark.parametrize(
  "text", ["\u2028 👩‍👩‍👧 שלום \x00 \x1b \ufeff", '\r\n\t"\\', "| a\n|  b\n"]
)
def test_texts_arrive_exactly(text):
  with judge_server.Server(judge_server.prefer_longer) as server:
    ask(settings(server.url), [judging.Question(text, text + "1", text + "2")])
  assert server.requests[0].texts == (text, text + "1", text + "2")


def test_only_the_proxy_is_taken_from_the_environment(monkeypatch):
  for name in ("http_proxy", "all_proxy", "no_proxy", "NO_PROXY", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("OPENAI_BASE_URL", NOWHERE)
  with judge_server.Server(judge_server.prefer_longer) as proxy:
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    (reply,) = ask(settings("http://judge.invalid/v1"))
    assert reply.choice == "first"
    assert proxy.requests[0].headers["host"] == "judge.invalid"
    assert KEY not in str(proxy.requests[0].headers)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.removesuffix("/v1"))
    (reply,) = ask(settings("https://judge.invalid/v1", max_retries=0))
    # The server is no proxy for tunnels.
    assert "501" in reply.error
    with judge_server.Server(judge_server.prefer_longer) as direct:
      monkeypatch.setenv("NO_PROXY", "127.0.0.1")
      ask(settings(direct.url))
    assert (len(direct.requests), len(proxy.requests)) == (1, 1)


def test_azure_gets_its_version_and_its_key(monkeypatch):
  monkeypatch.setenv("JKEY", KEY)
  with judge_server.Server(judge_server.prefer_longer) as server:
    url = f"{server.url}?api-version=2024-10-21"
    (reply,) = ask(settings(url, api_key_env="JKEY"))
  assert reply.choice == "first"
  (request,) = server.requests
  assert request.path == "/v1/chat/completions?api-version=2024-10-21"
  assert request.headers["api-key"] == KEY
  assert "authorization" not in request.headers


# --- retries and waits


@pytest.mark.parametrize(
  "headers",
  [
    {"retry_after": "0.3"},
    {"retry_after_ms": "300", "retry_after": "9"},
    {"retry_after": "date"},
    {"retry_after_ms": "-1", "retry_after": "0.3"},
  ],
)
def test_retry_after_is_waited_for_by_every_question(headers):
  asked_at = []

  def rule(request, number):
    asked_at.append(time.monotonic())
    if number:
      return GOOD
    if headers["retry_after"] != "date":
      return judge_server.fails(429, **headers)
    # Dates have whole seconds: this one is 0.3 to 1.3 s ahead.
    date = email.utils.formatdate(math.ceil(time.time() + 0.3), usegmt=True)
    return judge_server.fails(429, retry_after=date)

  async def go(server):
    async with client.Client(settings(server.url)) as judge:
      paused = asyncio.Event()
      pause = judge.pacer.pause
      judge.pacer.pause = lambda s: (pause(s), s > 0 and paused.set())
      first = asyncio.create_task(judge.ask(QUESTION))
      # Asked after the first one's reply, and held back by it.
      waits = (first, asyncio.create_task(paused.wait()))
      await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
      assert not first.done()
      return await asyncio.gather(first, judge.ask(QUESTION))

  with judge_server.Server(rule) as server:
    replies = asyncio.run(go(server))
  assert [reply.choice for reply in replies] == ["second", "second"]
  assert len(asked_at) == 3
  if headers["retry_after"] != "date":
    assert min(asked_at[1:]) - asked_at[0] >= 0.29


@pytest.mark.parametrize(
  "header", ["retry_after", "x_ratelimit_reset_requests"]
)
def test_a_time_since_1970_is_no_wait_of_decades(header):
  """It is the end of Retry-After's wait; other headers ask for none."""
  reset = {header: str(int(time.time()) + 1)}
  busy = judge_server.fails(429, **reset)
  with judge_server.Server(judge_server.in_turn(busy, GOOD)) as server:
    (reply,) = ask(settings(server.url))
  assert reply.choice == "second"


def test_a_wait_beyond_the_cap_ends_the_run():
  reply = judge_server.fails(429, "slow", retry_after="3600")
  with (
    judge_server.Server(judge_server.in_turn(reply)) as server,
    pytest.raises(judging.Stop, match=r"wait of 3600 s.*max_wait_s=5.*later"),
  ):
    ask(settings(server.url))
  assert len(server.requests) == 1


def test_all_waits_of_a_request_together_are_capped():
  reply = judge_server.fails(429, "slow", retry_after_ms="100")
  with judge_server.Server(judge_server.in_turn(reply)) as server:
    (reply,) = ask(settings(server.url, max_retries=9, max_wait_s=0.25))
  assert reply.choice == "missing"
  assert "HTTP 429: slow; a wait of" in reply.error
  assert "max_wait_s=0.25" in reply.error
  # At 0, 0.1 and 0.2 s; a third wait would make 0.3 s.
  assert len(server.requests) == 3


def test_the_cap_spaces_requests_evenly():
  """A hundred requests a second: ten at once take 90 ms."""

  async def go():
    pacer, begin = client.Pacer(6000.0), time.monotonic()
    await asyncio.gather(*(pacer.wait() for _ in range(10)))
    return time.monotonic() - begin

  assert asyncio.run(go()) >= 0.09


# --- faults


def echo(request, number):
  """Repeats the key of the request."""
  sent = request.headers["authorization"]
  return judge_server.says(f"{sent}\nMore helpful: A", system_fingerprint=sent)


def struck(**changes):
  """The longer text wins, but the sending fails: fields of `Reply`."""
  completion = judge_server.says("Comparison: x.\nMore helpful: A")
  return dataclasses.replace(completion, **changes)


STATUSES = (400, 408, 429, 500, 503)
REPLIES = {
  "longer": judge_server.prefer_longer,
  "second": judge_server.always("B"),
  "tie": judge_server.always("tie"),
  "garbage": judge_server.says("Lorem ipsum, dolor sit amet."),
  "empty": judge_server.says(""),
  "null": judge_server.says(None),
  "unsure": judge_server.says("Comparison: alike.\nMore helpful: A or B"),
  "cut": judge_server.says("More helpful: A\nMore", finish_reason="length"),
  "error": judge_server.Reply(
    body=b'{"error": {"message": "no", "code": 502}}'
  ),
  "said": judge_server.Reply(body=b'{"error": "overloaded"}'),
  "inside": judge_server.says(
    None, choices=[{"error": {"message": "cut off"}}]
  ),
  "parts": judge_server.says(
    [
      {"type": "thinking", "thinking": "More helpful: B"},
      {"type": "text", "text": "More helpful: A"},
    ]
  ),
  "thought": judge_server.says(
    "<think>\nMore helpful: A\n</think>\n\nSorry, no."
  ),
  "prohibited": judge_server.fails(400, "filtered", code="content_filter"),
  "flagged": judge_server.Reply(
    403, b'{"error": {"message": "flagged", "metadata": {"flagged_input": ""}}}'
  ),
  "long": judge_server.fails(
    400, "max_tokens is too large for this model's maximum context length"
  ),
  "unfit": judge_server.Reply(
    400, b'{"error": {"message": "a temperature?", "param": "messages"}}'
  ),
  "choiceless": judge_server.says("More helpful: A", choices=[]),
  "echo": echo,
  "refusal": judge_server.says("I'm sorry, but I can't assist with that."),
  "refused": judge_server.says(None, refusal="I will not compare these."),
  "filtered": judge_server.says("", finish_reason="content_filter"),
  "html": judge_server.Reply(body=b"<html/>", content_type="text/html"),
  "gateway": judge_server.Reply(502, b"<html/>", content_type="text/html"),
  "junk": judge_server.Reply(body=b'{"id": "1", "choi\xff'),
  "half": struck(cut=True),
  "reset": struck(reset=True),
  "hang": struck(hold_s=3600.0),
  "drip": struck(drip_s=0.02),
  "later": judge_server.fails(429, retry_after="0.02"),
} | {str(status): judge_server.fails(status) for status in STATUSES}


def in_turn(names: str) -> judge_server.Rule:
  return judge_server.in_turn(*(REPLIES[name] for name in names.split()))


# Replies in turn, further settings, what the reply is, its error, requests.
ROWS = {
  "longer": ({}, "first", "", 1),
  "second": ({}, "second", "", 1),
  "500 gateway longer": ({}, "first", "", 3),
  "503 408 longer": ({}, "first", "", 3),
  "429 429 longer": ({}, "first", "", 3),
  "later longer": ({}, "first", "", 2),
  "junk html longer": ({}, "first", "", 3),
  "half reset longer": ({}, "first", "", 3),
  "garbage longer": ({}, "first", "", 2),
  "500": ({}, "missing", "HTTP 500: no", 3),
  "html": ({}, "missing", "the reply is not a chat completion", 3),
  "junk": ({}, "missing", "the reply is not a chat completion", 3),
  "half": ({}, "missing", "connection failed", 3),
  "reset": ({}, "missing", "connection failed", 3),
  # Long enough for the rest of a request on a loaded machine.
  "hang longer": ({"timeout_s": 1.0}, "first", "", 2),
  # Every byte comes in time, the whole never does.
  "drip": (
    {"timeout_s": 1.0, "max_retries": 0},
    "missing",
    "no reply within 1 s",
    1,
  ),
  "400": ({"output": "json_schema"}, "missing", "HTTP 400: no", 1),
  "garbage": ({}, "missing", "no verdict in the reply", 2),
  "empty": ({}, "missing", "no verdict in the reply", 2),
  "null": ({}, "missing", "no verdict in the reply", 2),
  "unsure": ({}, "missing", "no verdict in the reply", 2),
  "tie": ({}, "missing", "no verdict in the reply", 2),
  "cut": ({}, "missing", "cut at max_tokens", 2),
  "choiceless": ({}, "missing", "the reply has no choices", 2),
  "error": ({}, "missing", "HTTP 502: no", 3),
  "said longer": ({}, "first", "", 2),
  "said": ({}, "missing", "overloaded", 3),
  "inside": ({}, "missing", "cut off", 3),
  "parts": ({}, "first", "", 1),
  "thought": ({}, "refusal", "", 1),
  "prohibited": ({}, "refusal", "", 1),
  "flagged": ({}, "refusal", "", 1),
  "long": ({}, "missing", "maximum context length", 1),
  "unfit": ({}, "missing", "a temperature?", 1),
  "refusal": ({}, "refusal", "", 1),
  "refused": ({}, "refusal", "", 1),
  "filtered": ({}, "refusal", "", 1),
}


@pytest.mark.parametrize("names", ROWS)
def test_a_fault_and_its_outcome(names):
  changes, choice, error, requests = ROWS[names]
  with judge_server.Server(in_turn(names)) as server:
    (reply,) = ask(settings(server.url, **changes))
  assert (reply.choice, bool(reply.error)) == (choice, bool(error))
  assert error in reply.error
  assert len(server.requests) == requests


@pytest.mark.parametrize(
  ("reply", "hint"),
  [
    (judge_server.fails(401, f"wrong key {KEY}"), "check the key in JKEY"),
    (judge_server.fails(403, f"{KEY} may not"), "check the key in JKEY"),
    (judge_server.fails(404, "no model"), "model='judge-as-asked'"),
    (
      judge_server.fails(429, "spent", code="insufficient_quota"),
      "quota is exhausted",
    ),
    (
      judge_server.fails(400, f"{'x' * 400} 'temperature' is not supported"),
      r"supported \(set server\.omit=temperature\)",
    ),
    (
      judge_server.fails(400, "Use 'max_completion_tokens', not 'max_tokens'."),
      r"server\.omit=max_tokens, or server\.max_tokens_name=max_com",
    ),
    (judge_server.fails(422, "body: response_format"), r"server\.output=text"),
    (
      judge_server.Reply(
        422,
        b'{"detail": [{"loc": ["body", "logprobs"], "msg": "no", "input":'
        b' {"temperature": 0}}]}',
      ),
      r"server\.top_logprobs=0",
    ),
    (judge_server.fails(400, "logprobs: no"), r"server\.top_logprobs=0"),
    (
      judge_server.fails(400, "The model `m` does not exist."),
      r"not exist\. \(set server\.model",
    ),
  ],
)
def test_a_hopeless_run_stops_at_once_without_the_key(monkeypatch, reply, hint):
  monkeypatch.setenv("JKEY", KEY)
  with (
    judge_server.Server(judge_server.in_turn(reply)) as server,
    pytest.raises(judging.Stop, match=hint) as caught,
  ):
    ask(settings(server.url, api_key_env="JKEY"), [QUESTION] * 9)
  assert len(server.requests) == 1
  error = caught.value
  while error is not None:
    assert KEY not in repr(error)
    error = error.__cause__ or error.__context__


def ask_in_turn(used, count, concurrency=1) -> list[judging.Reply]:
  """Replies to groups of `concurrency` questions."""

  async def go():
    async with client.Client(used, concurrency) as judge:
      groups = [range(concurrency)] * (count // concurrency)
      return [
        await asyncio.gather(*(judge.ask(QUESTION) for _ in group))
        for group in groups
      ]

  return [reply for group in asyncio.run(go()) for reply in group]


@pytest.mark.parametrize(("concurrency", "most"), [(30, 20), (8, 8), (1, 4)])
def test_a_silent_judge_stops_the_run_after_one_timeout(
  concurrency, most, monkeypatch
):
  """One at a time, after more than a question with its two retries."""
  monkeypatch.setattr(client, "_ALONE_S", 0.05)
  message = f"{most} requests in a row.*no reply within .* s.*the same command"
  with judge_server.Server(in_turn("hang")) as server:
    # Several at once have no time for a retry.
    used = settings(
      server.url, timeout_s=0.5, retry_wait_s=9.0, max_wait_s=60.0
    )
    if concurrency == 1:
      used = settings(server.url, timeout_s=0.2)
    with pytest.raises(judging.Stop, match=message):
      ask_in_turn(used, 60, concurrency)
  assert len(server.requests) == max(concurrency, most)


def test_a_dead_judge_stops_the_run(monkeypatch):
  """Retries counted: two for each question."""
  replies = ask_in_turn(settings(NOWHERE), 6)
  assert {reply.choice for reply in replies} == {"missing"}
  with pytest.raises(judging.Stop, match=r"20 requests.*connection failed"):
    ask_in_turn(settings(NOWHERE), 7)
  monkeypatch.setattr(client, "_DEAD", 4)
  with judge_server.Server(in_turn("500 500 500 longer 500")) as server:
    # A reply in between shows that the judge lives, as does a 429, ...
    replies = ask_in_turn(settings(server.url), 3)
    assert [x.choice for x in replies] == ["missing", "first", "missing"]
    server.rule = in_turn("429 later")
    ask_in_turn(settings(server.url), 2)
    # ... and the refusal of one question, but of four not.
    server.rule = in_turn("long")
    ask_in_turn(settings(server.url), 5)
    server.rule = in_turn("400")
    with pytest.raises(judging.Stop, match=r"4 requests.*HTTP 400: no"):
      ask_in_turn(settings(server.url), 5)


# --- settings


def test_a_key_may_go_in_clear_to_this_machine_or_if_allowed():
  for host in ("localhost", "127.0.0.1", "[::1]", "a.localhost"):
    settings(f"http://{host}:8000/v1", api_key_env="JKEY")
  settings("http://10.0.0.1/v1", api_key_env="JKEY", allow_http=True)
  settings("http://10.0.0.1/v1")
  for host in ("10.0.0.1", "127.0.0.1.example.com", "localhost.example.com"):
    with pytest.raises(ValueError, match="unencrypted"):
      settings(f"http://{host}/v1", api_key_env="JKEY")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"base_url": "localhost:8000"}, "http://"),
    ({"base_url": f"https://{KEY}@host/v1"}, "no user or key before an '@'"),
    ({"api_key_env": KEY}, "must be the name of an environment variable"),
    ({"model": ""}, "model"),
    ({"max_tokens": 0}, "max_tokens=0"),
    (
      {"base_url": "http://example.com/v1", "api_key_env": "JKEY"},
      "unencrypted to 'example.com'.*allow_http=True",
    ),
    (
      {
        "omit": ("max_tokens",),
        "budget_usd": 1.0,
        "prices": ("judge-as-asked 1 1",),
      },
      "max_tokens in omit",
    ),
    ({"budget_usd": 1.0}, r"budget_usd=1 cannot.*'judge-as-asked'"),
  ],
)
def test_settings_that_make_no_sense(changes, message):
  with pytest.raises(ValueError, match=message) as caught:
    settings(NOWHERE, **changes)
  assert KEY not in str(caught.value)


@pytest.mark.parametrize(
  "value", [None, "", " \n", "clé", "a\nb", f'"{KEY}"', f"Bearer {KEY}"]
)
def test_a_key_that_is_none(monkeypatch, value):
  monkeypatch.delenv("JKEY", raising=False)
  if value is not None:
    monkeypatch.setenv("JKEY", value)
  with pytest.raises(ValueError, match="environment variable JKEY") as caught:
    ask(settings(NOWHERE, api_key_env="JKEY"))
  assert not (value or "").strip() or value not in str(caught.value)


def test_the_identity_of_a_judge_has_all_that_a_reply_depends_on():
  variants = [
    settings(NOWHERE),
    settings(NOWHERE, model="other"),
    settings(NOWHERE, temperature=0.5),
    settings(NOWHERE, max_tokens=65),
    settings(NOWHERE, template="summary"),
    settings(NOWHERE, omit=("temperature",)),
    # Where and how patiently a judge is asked changes no reply.
    settings("http://127.0.0.1:10/v1", timeout_s=1.0, max_retries=0),
  ]
  found = [client.Client(used).judge.identity for used in variants]
  assert len(set(found)) == 6
  assert found[0] == found[-1]

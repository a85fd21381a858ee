import asyncio
import collections
import email.utils
import socket
import time

import judge_server
import pytest

from dpo_jax import judging
from dpo_jax.judging import client, prompts

KEY = "sk-planted-0123456789"
QUESTION = judging.Question("\n\nHuman: hi\n\nAssistant:", " longer", " no")


def settings(url, **changes) -> client.ServerSettings:
  values = {
    "base_url": url,
    "api_key_env": "",
    "model": "judge-as-asked",
    "temperature": 0.0,
    "max_tokens": 64,
    "max_tokens_name": "max_tokens",
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
    "tokens_per_minute": 0.0,
    "budget_usd": 0.0,
    "prices": (),
    "batch_price": 0.5,
    "batch_size": 1000,
    "batch_poll_s": 0.01,
    "expected_reply_tokens": 20,
    "expected_reply_s": 1.0,
  }
  return client.ServerSettings(**(values | changes))


def ask(used, questions=(QUESTION,)) -> list[judging.Reply]:
  async def go():
    async with client.Client(used, 8) as judge:
      return await asyncio.gather(*map(judge.ask, questions))

  return asyncio.run(go())


TEMPLATE = prompts.load("dialogue", output="text", ties=False)


GOOD = judge_server.says("Comparison: x.\nMore helpful: B")


def test_a_request_carries_the_prompt_and_the_settings(monkeypatch):
  monkeypatch.setenv("MY_JUDGE_KEY", KEY + "\n")
  with judge_server.Server(judge_server.prefer_longer) as fake:
    used = settings(fake.url, api_key_env="MY_JUDGE_KEY", temperature=0.5)
    (reply,) = ask(used)
  (request,) = fake.requests
  assert request.headers["authorization"] == f"Bearer {KEY}"
  assert request.body == {
    "model": "judge-as-asked",
    "messages": [
      {
        "role": "user",
        "content": prompts.fill(TEMPLATE, QUESTION),
      }
    ],
    "temperature": 0.5,
    "max_tokens": 64,
  }
  assert reply == judging.Reply(
    choice="first",
    text="Comparison: one is better.\nMore helpful: A",
    model="judge-as-served",
    error="",
    fingerprint="fp_fake",
    # A quarter of the bytes, as the server counts; 42 characters of reply.
    prompt_tokens=-(-len(prompts.fill(TEMPLATE, QUESTION)) // 4),
    completion_tokens=11,
  )


def test_the_cap_has_the_name_that_the_server_wants():
  with judge_server.Server(judge_server.prefer_longer) as fake:
    ask(settings(fake.url, max_tokens_name="max_completion_tokens"))
  (request,) = fake.requests
  assert request.body["max_completion_tokens"] == 64
  assert "max_tokens" not in request.body


@pytest.mark.parametrize(
  "text", ["\u2028 👩‍👩‍👧 שלום \x00 \x1b \ufeff", '\r\n\t"\\', "| a\n|  b\n"]
)
def test_texts_arrive_exactly(text):
  with judge_server.Server(judge_server.prefer_longer) as fake:
    ask(settings(fake.url), [judging.Question(text, text + "1", text + "2")])
  assert fake.requests[0].texts == (text, text + "1", text + "2")


def test_the_environment_of_the_sdk_is_not_used(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
  with judge_server.Server(judge_server.prefer_longer) as fake:
    (reply,) = ask(settings(fake.url))
  assert reply.choice == "first"
  assert KEY not in str(fake.requests[0].headers)


def test_no_server():
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    (reply,) = ask(settings(url))
  assert reply.choice == "missing"
  assert "connection failed" in reply.error


@pytest.mark.parametrize(
  "headers",
  [
    {"retry_after": "0.3"},
    {"retry_after_ms": "300", "retry_after": "9"},
    {"retry_after": "date"},
  ],
)
def test_retry_after_is_waited_for_by_every_question(headers):
  if headers["retry_after"] == "date":
    # Dates have whole seconds: this one is 0 to 1 s ahead when it is read.
    date = email.utils.formatdate(time.time() + 1.0, usegmt=True)
    headers = {"retry_after": date}
  asked_at = []

  def rule(request, number):
    asked_at.append(time.monotonic())
    return judge_server.fails(429, **headers) if number == 0 else GOOD

  async def go(fake):
    async with client.Client(settings(fake.url), 8) as judge:
      first = asyncio.create_task(judge.ask(QUESTION))
      # Asked later, and held back by the answer that the first one got.
      while not (judge.limits.next_at > time.monotonic() or first.done()):
        await asyncio.sleep(0.001)
      return await asyncio.gather(first, judge.ask(QUESTION))

  with judge_server.Server(rule) as fake:
    replies = asyncio.run(go(fake))
  assert [reply.choice for reply in replies] == ["second", "second"]
  assert len(asked_at) == 3
  if "GMT" not in headers["retry_after"]:
    assert min(asked_at[1:]) - asked_at[0] >= 0.29


def test_a_wait_beyond_the_cap_ends_the_run():
  answer = judge_server.fails(429, "slow", retry_after="3600")
  with (
    judge_server.Server(judge_server.in_turn(answer)) as fake,
    pytest.raises(judging.Stop, match=r"wait of 3600 s.*max_wait_s=5.*later"),
  ):
    ask(settings(fake.url))
  assert len(fake.requests) == 1


def test_all_waits_of_a_request_together_are_capped():
  answer = judge_server.fails(429, "slow", retry_after_ms="100")
  with judge_server.Server(judge_server.in_turn(answer)) as fake:
    (reply,) = ask(settings(fake.url, max_retries=9, max_wait_s=0.25))
  assert reply.choice == "missing"
  assert "HTTP 429: slow; a wait of" in reply.error
  assert "max_wait_s=0.25" in reply.error
  # At 0, 0.1 and 0.2 s; a third wait would make 0.3 s.
  assert len(fake.requests) == 3


def test_the_proxy_of_the_environment_is_used_and_its_exceptions(monkeypatch):
  for name in ("http_proxy", "all_proxy", "no_proxy", "NO_PROXY", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  with judge_server.Server(judge_server.prefer_longer) as proxy:
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    (reply,) = ask(settings("http://judge.invalid/v1"))
    assert reply.choice == "first"
    assert proxy.requests[0].headers["host"] == "judge.invalid"
    with judge_server.Server(judge_server.prefer_longer) as direct:
      monkeypatch.setenv("NO_PROXY", "127.0.0.1")
      (reply,) = ask(settings(direct.url))
    assert (len(direct.requests), len(proxy.requests)) == (1, 1)


@pytest.mark.parametrize(
  ("answer", "mend"),
  [
    (judge_server.fails(401, f"wrong key {KEY}"), "check the key in JKEY"),
    (judge_server.fails(403, f"{KEY} may not"), "check the key in JKEY"),
    (judge_server.fails(404, "no model"), "model='judge-as-asked'"),
    (
      judge_server.fails(429, "spent", code="insufficient_quota"),
      "quota is spent",
    ),
  ],
)
def test_a_hopeless_run_stops_at_once_without_the_key(
  monkeypatch, answer, mend
):
  monkeypatch.setenv("JKEY", KEY)
  with (
    judge_server.Server(judge_server.in_turn(answer)) as fake,
    pytest.raises(judging.Stop, match=mend) as caught,
  ):
    ask(settings(fake.url, api_key_env="JKEY"))
  assert len(fake.requests) == 1
  error = caught.value
  while error is not None:
    assert KEY not in repr(error)
    error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"base_url": "localhost:8000"}, "http://"),
    ({"base_url": f"https://{KEY}@host/v1"}, "no user or key before an '@'"),
    ({"api_key_env": KEY}, "must be the name of an environment variable"),
    ({"model": ""}, "model"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"timeout_s": float("nan")}, "timeout_s=nan"),
    ({"max_retries": -1}, "max_retries=-1"),
  ],
)
def test_settings_that_make_no_sense(changes, message):
  with pytest.raises(ValueError, match=message) as caught:
    settings("http://127.0.0.1/v1", **changes)
  assert KEY not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", " \n", "clé", "a\nb"])
def test_a_key_that_is_none(monkeypatch, value):
  monkeypatch.delenv("JKEY", raising=False)
  if value is not None:
    monkeypatch.setenv("JKEY", value)
  with pytest.raises(ValueError, match="environment variable JKEY") as caught:
    ask(settings("http://127.0.0.1:9/v1", api_key_env="JKEY"))
  assert not (value or "").strip() or value not in str(caught.value)


def test_the_parameters_of_a_judge_tell_judges_apart():
  async def identity(used):
    async with client.Client(used, 8) as one:
      judge = one.judge
      return judge.name, judge.parameters, judge.template_hash

  url = "http://127.0.0.1:9/v1"
  variants = [
    settings(url),
    settings(url, model="other"),
    settings(url, temperature=0.5),
    settings(url, max_tokens=65),
    # Where and how patiently a judge is asked does not change its answer.
    settings("http://127.0.0.1:10/v1", timeout_s=1.0, max_retries=0),
  ]
  found = [asyncio.run(identity(used)) for used in variants]
  assert len(set(found)) == 4
  assert found[0] == found[-1]
  assert collections.Counter(found).most_common(1)[0][0] == found[0]

"""Rows of responses and judge calls, by hand."""

import dataclasses

from dpo_jax.io import hashing, records

PROMPT = "\n\nHuman: hi\n\nAssistant:"


def response(number=0, text=" longer than it", chosen=" short", **changes):
  """A response to prompt p<number>; `changes` replace any other field."""
  row = records.Response(
    prompt_id=f"p{number}",
    prompt=PROMPT,
    response=text,
    chosen=chosen,
    model="dpo",
    step=None,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=8,
    seed=0,
    sample_id=0,
    token_count=7,
    finish_reason="eos",
  )
  return dataclasses.replace(row, **changes)


def call(
  verdict,
  prompt="p0",
  order="model_first",
  *,
  model="dpo",
  step=None,
  temperature=1.0,
  sample=0,
  control="",
  **changes,
):
  """One judge call; `changes` replace any other field of the row."""
  key = f"{model} {step} {temperature} {prompt} {sample} {order} {control}"
  row = records.Verdict(
    key=hashing.content_hash(key),
    prompt_id=prompt,
    model=model,
    step=step,
    temperature=temperature,
    sample_id=sample,
    order=order,
    control=control,
    verdict=verdict,
    score=None,
    judge="judge-1",
    judge_returned="judge-1",
    judge_fingerprint="",
    template_hash="t1",
    response_chars=100,
    chosen_chars=50,
    prompt_tokens=0,
    completion_tokens=0,
    raw="",
    error="",
  )
  return dataclasses.replace(row, **changes)


def both(first, second, prompt, **fields):
  """The two calls of a prompt: verdicts model-first and chosen-first."""
  return [
    call(first, prompt, "model_first", **fields),
    call(second, prompt, "chosen_first", **fields),
  ]


def control(kind, verdict, prompt="p0", order="model_first", **fields):
  """A control call on chosen texts, as the runner writes it."""
  fields = {"model": "chosen", "temperature": 0.0} | fields
  return call(verdict, prompt, order, control=kind, **fields)


def scored(scores, **fields):
  """Both orders of prompts p0, p1, ... with scores 0, 1/2 or 1."""
  outcomes = {0: ("chosen", "chosen"), 0.5: ("model", "chosen"), 1: ("model",)}
  return [
    row
    for index, score in enumerate(scores)
    for row in both(
      *(outcomes[float(score)] * 2)[:2], f"p{index:04d}", **fields
    )
  ]

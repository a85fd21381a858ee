"""Secrets of the environment stay out of all output.

The stages themselves are searched in test_replicate, where every run has keys
planted and a judge that echoes what it was sent.
"""

import os
import pathlib
import subprocess
import sys

import planted
import pytest

from dpo_jax.core import redaction

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECRET = "a secret/of words"


@pytest.fixture
def environment(monkeypatch):
  for name in [*os.environ]:
    if name.endswith(("KEY", "TOKEN", "SECRET", "PASSWORD")):
      monkeypatch.delenv(name)
  return monkeypatch


def test_values_become_the_names_of_their_variables(environment):
  environment.setenv("OPENAI_API_KEY", "sk-0123456789")
  environment.setenv("HF_TOKEN", "sk-0123456789-longer\n")
  environment.setenv("my_password", SECRET)
  environment.setenv("SHORT_KEY", "a")
  environment.setenv("KEYBOARD", "de-latin1-nodeadkeys")
  text = "sk-0123456789-longer, sk-0123456789, a, de-latin1-nodeadkeys"
  assert redaction.clean(text) == (
    "[HF_TOKEN], [OPENAI_API_KEY], a, de-latin1-nodeadkeys"
  )
  assert redaction.clean(f"{SECRET} x=a%20secret%2Fof%20words&") == (
    "[my_password] x=[my_password]&"
  )


def test_settings_that_hold_a_key_are_refused_without_it(environment):
  environment.setenv("OPENAI_API_KEY", "sk-0123456789")
  values = {"a": [1, {"b": "Bearer sk-0123456789"}], "c": None}
  with pytest.raises(ValueError, match=r"config\.a\[1\]\.b holds") as caught:
    redaction.refuse(values)
  assert "OPENAI_API_KEY" in str(caught.value)
  assert "sk-0" not in str(caught.value)
  redaction.refuse({"a": ["sk-", "OPENAI_API_KEY"]})


# Every way that Python has to print a key.
SAYS = {
  "print": "print(key)",
  "pieces": "print('a', key, key, file=sys.stderr)",
  "lines": "sys.stderr.writelines([key, key])",
  "log": "logging.getLogger('x').warning('with %s and %d', key, 1)",
  "old handler": "logging.getLogger('x').addHandler(old); logging.error(key)",
  "logged traceback": "try: int(key)\nexcept ValueError: logging.exception('')",
  "warning": "warnings.warn(key)",
  "traceback": "raise RuntimeError(key)",
  "chained": "try: int(key)\nexcept ValueError as e: raise OSError() from e",
  "thread": "t = threading.Thread(target=int, args=[key]); t.start(); t.join()",
  "exit": "sys.exit(key)",
}


def test_nothing_that_python_says_holds_a_key():
  code = (
    "import logging, os, sys, threading, warnings\n"
    "old = logging.StreamHandler()\n"
    "logging.basicConfig()\n"
    "from dpo_jax.core import redaction\n"
    "redaction.install(); redaction.install()\n"
    "key = os.environ['HF_TOKEN']\n"
    f"for name, statement in {SAYS!r}.items():\n"
    "  if not os.fork():\n"
    "    print('begins', name, flush=True)\n"
    "    exec(statement)\n"
    "    sys.exit()\n"
    "  os.wait()\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | planted.KEYS,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  said = done.stdout + done.stderr
  for name in SAYS:
    assert f"begins {name}\n" in said
  planted.absent(said.encode(), "the output")
  # Each printed something.
  assert said.count("[HF_TOKEN]") >= len(SAYS)

"""Scores of real rows, against transformers, peft and torch."""

import copy
import json
import pathlib
import re

import numpy as np
import peft
import pytest
import torch
import torch_weights
import transformers

from dpo_jax.data import sources, tokenizer
from dpo_jax.training import score

LAYERS, WIDTH, VOCABULARY = 2, 64, 50304
# Nats. Sums of some 60 log-probs of about -11 nats: float32 keeps seven digits.
TOLERANCE = 1e-4
# peft asks transformers by a name that transformers 5 has deprecated.
PEFT_WARNS = pytest.mark.filterwarnings(
  "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def network(seed):
  """A random GPTNeoX whose next-token distributions are far from flat."""
  config = transformers.GPTNeoXConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=512,
  )
  made = transformers.GPTNeoXForCausalLM(config).eval()
  torch_weights.randomise(made, seed)
  return made


def torch_logps(module, prompt, response):
  """log p of each response token, one plain forward pass a sequence."""
  with torch.no_grad():
    logits = module(torch.tensor([prompt + response])).logits[0, :-1]
  logps = torch.log_softmax(logits.double(), dim=-1)
  targets = torch.tensor(prompt + response)[1:]
  picked = logps[torch.arange(len(targets)), targets]
  return picked[len(prompt) - 1 :].numpy()


@pytest.fixture(scope="module")
def models(shared, tmp_path_factory):
  """Policy and reference: directories, and torch's own copies."""
  root = tmp_path_factory.mktemp("models")
  found = {}
  for seed, name in enumerate(("policy", "reference")):
    module = network(seed)
    module.save_pretrained(root / name)
    tokenizer.load(shared / "tokenizer" / "pythia").save(root / name)
    found[name] = (str(root / name), module)
  return found


@pytest.fixture(scope="module")
def rows(shared):
  """Real pairs in file order, short ones to spare torch the time."""
  path = shared / "data" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
  found = sources.read_file(str(path)).rows
  short = [row for row in found if len(row.prompt + row.chosen) < 300]
  return [row for row in short if len(row.rejected) < 200][:8]


@pytest.fixture
def pairs(rows, tmp_path):
  """Those rows as a file: every other one in HH's own form of transcripts."""
  path = tmp_path / "pairs.jsonl"
  with path.open("w", encoding="utf-8") as file:
    for i, row in enumerate(rows):
      value = {"chosen": row.chosen, "rejected": row.rejected}
      if i % 2:
        value = {key: row.prompt + text for key, text in value.items()}
      else:
        value["prompt"] = row.prompt
      file.write(json.dumps(value) + "\n")
  return path


def scored(tmp_path, pairs, *flags):
  """The output file's rows of a command line."""
  output = tmp_path / "out.jsonl"
  score.run(
    score.parse(
      [f"--pairs={pairs}", f"--output={output}", "--batch_size=3", *flags]
    )
  )
  return [json.loads(line) for line in output.read_text().splitlines()]


def test_scores_equal_torch_on_real_rows(models, rows, pairs, tmp_path):
  directory, policy = models["policy"]
  reference_directory, reference = models["reference"]
  out = scored(
    tmp_path,
    pairs,
    f"--model={directory}",
    f"--reference={reference_directory}",
    "--beta=0.3",
  )
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  assert [row["id"] for row in out] == [row.id for row in rows]
  for row, given in zip(out, rows, strict=True):
    prompt = theirs(given.prompt)["input_ids"]
    assert (row["prompt_token_count"], row["cut"]) == (len(prompt), False)
    wanted = {}
    for side in ("chosen", "rejected"):
      response = [*theirs(getattr(given, side))["input_ids"], 0]
      expected = torch_logps(policy, prompt, response)
      assert row[f"{side}_token_count"] == len(response)
      np.testing.assert_allclose(
        row[f"{side}_token_logps"], expected, rtol=0, atol=TOLERANCE
      )
      wanted[f"{side}_logps"] = expected.sum()
      other = torch_logps(reference, prompt, response).sum()
      wanted[f"{side}_reward"] = 0.3 * (expected.sum() - other)
    wanted["margin"] = wanted["chosen_reward"] - wanted["rejected_reward"]
    for name, value in wanted.items():
      assert row[name] == pytest.approx(value, abs=TOLERANCE), name
    assert abs(wanted["margin"]) > 0.1


@PEFT_WARNS
def test_an_adapter_is_scored_against_the_model_without_it(
  models, rows, pairs, tmp_path
):
  directory, _ = models["policy"]
  adapted = peft.get_peft_model(
    transformers.AutoModelForCausalLM.from_pretrained(directory),
    peft.LoraConfig(
      r=2, lora_alpha=4, target_modules=["query_key_value", "dense_4h_to_h"]
    ),
  ).eval()
  torch_weights.randomise(adapted, 5, only="lora_")
  adapted.save_pretrained(tmp_path / "adapter")
  out = scored(
    tmp_path,
    pairs,
    f"--model={directory}",
    f"--adapter={tmp_path / 'adapter'}",
  )
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  for row, given in list(zip(out, rows, strict=True))[:3]:
    prompt = theirs(given.prompt)["input_ids"]
    response = [*theirs(given.chosen)["input_ids"], 0]
    expected = torch_logps(adapted, prompt, response).sum()
    with adapted.disable_adapter():
      other = torch_logps(adapted, prompt, response).sum()
    assert abs(expected - other) > 1
    assert row["chosen_logps"] == pytest.approx(expected, abs=TOLERANCE)
    reward = 0.1 * (expected - other)
    assert row["chosen_reward"] == pytest.approx(reward, abs=TOLERANCE)


def test_texts_are_tokenized_and_cut_by_the_rule_that_is_named(
  models, rows, pairs, tmp_path
):
  """Here responses are stripped, so that their first token is another."""
  directory, policy = models["policy"]
  out = scored(
    tmp_path,
    pairs,
    f"--model={directory}",
    "--tokenization=dpo-replication",
    "--max_length=60",
  )
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  for row, given in zip(out, rows, strict=True):
    whole = theirs(given.prompt)["input_ids"]
    chosen, rejected = (
      [*theirs(text.strip())["input_ids"], 0]
      for text in (given.chosen, given.rejected)
    )
    # Half of max_length by default, and less before a long response.
    prompt = whole[-30:]
    over = len(prompt) + max(len(chosen), len(rejected)) - 60
    prompt = prompt[max(0, over) :]
    assert row["cut"] == (prompt != whole)
    np.testing.assert_allclose(
      row["chosen_token_logps"],
      torch_logps(policy, prompt, chosen),
      rtol=0,
      atol=TOLERANCE,
    )
    assert not {"margin", "chosen_reward"} & row.keys()
  assert {row["cut"] for row in out} == {True, False}


def test_weights_whose_log_probs_overflow_are_named(models, pairs, tmp_path):
  directory, module = models["policy"]
  huge = tmp_path / "huge"
  tokenizer.load(directory).save(huge)
  large = copy.deepcopy(module)
  with torch.no_grad():
    large.get_output_embeddings().weight *= 1e38
  large.save_pretrained(huge)
  with pytest.raises(ValueError, match=r"huge: log-probs of .* pair .*float32"):
    scored(tmp_path, pairs, f"--model={huge}")
  assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_cannot_be_scored_are_named(models, pairs, tmp_path):
  directory, _ = models["policy"]
  # Weights that would be refused: they are not looked at.
  empty = tmp_path / "model"
  tokenizer.load(directory).save(empty)
  (empty / "config.json").write_bytes(
    pathlib.Path(directory, "config.json").read_bytes()
  )
  lines = pairs.read_text().splitlines()
  special = {"prompt": "a", "chosen": " b<|endoftext|>", "rejected": " c"}
  same = {"prompt": "a", "chosen": " b", "rejected": " b"}
  for bad, said in (
    (lines[2][:-5], f"{pairs}:3: not JSON"),
    (
      json.dumps({"prompt": "a", "chosen": " b", "rejected": 7}),
      f"{pairs}:3: ",
    ),
    (json.dumps(special), "'holds a special token': 1"),
    (json.dumps(same), "'quarantined: identical responses': 1"),
  ):
    pairs.write_text("\n".join([*lines[:2], bad, *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=re.escape(said)):
      scored(tmp_path, pairs, f"--model={empty}")
  assert not (tmp_path / "out.jsonl").exists()


def test_settings_that_cannot_be_met_are_refused(
  models, pairs, tmp_path, capsys, monkeypatch
):
  directory, _ = models["policy"]
  model = f"--model={directory}"

  def refused(message, *flags):
    with pytest.raises(ValueError, match=message):
      scored(tmp_path, pairs, model, *flags)

  refused("max_length=513 is more than the model's 512", "--max_length=513")
  refused("beta=0", "--beta=0")
  no_prompt_length = ("--tokenization=trl", "--max_prompt_length=9")
  refused("max_prompt_length=9 has no meaning in", *no_prompt_length)
  refused("out.jsonl cannot be written", f"--output={tmp_path}/no/out.jsonl")
  refused("other than the pairs", f"--output={pairs}")
  refused("is neither a file", f"--pairs={tmp_path / 'none.jsonl'}")
  small = tmp_path / "small"
  tokenizer.train(["a b"], 260, small)
  config = json.loads((tmp_path / directory / "config.json").read_text())
  (small / "config.json").write_text(json.dumps(config))
  refused("has another tokenizer", f"--reference={small}")
  (small / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
  (small / "tokenizer.json").unlink()
  refused("50277 tokens.*vocab_size=300", f"--reference={small}")
  # As a command, a refusal is one line and exit code 2.
  command = ["score", model, f"--pairs={pairs}", f"--output={pairs}"]
  monkeypatch.setattr("sys.argv", command)
  assert score.main() == 2
  assert capsys.readouterr().err.startswith("error: output=")

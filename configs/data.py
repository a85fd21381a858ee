"""Sources of preference pairs: known datasets and the fields of any other.

`data.use` names those to read: `--config.data.use="('shp',)"`. Several are
mixed: `--config.data.use="('hh','shp')" --config.data.sources.shp.weight=0.5`.
"""

from ml_collections import config_dict


def source() -> config_dict.ConfigDict:
  """All fields of a source, for a file of pairs with its own held-out file."""
  c = config_dict.ConfigDict()
  # Row form. "pairs": prompt, chosen, rejected, or HH's two transcripts, or
  # TRL's lists of messages. "unpaired": prompt, completion, label, for KTO.
  # "hh", "shp", "se", "tldr": the datasets of the functions below. "tfds": HH
  # written by `python -m dpo_jax.data.sources.hh_tfds`.
  c.kind = "pairs"
  # A .jsonl(.gz) file; a directory of <subset>/<split>.jsonl(.gz), of
  # <split>.jsonl(.gz), or of parquet files; a hub id, user/name or
  # user/name@revision. For "tfds", the data_dir of the command.
  c.train_path = "pairs/train.jsonl"
  # Split of a directory or hub dataset; a file is one split.
  c.train_split = "train"
  # As train_path; "" holds out a share of the training prompts instead.
  c.eval_path = "pairs/test.jsonl"
  # As train_split, of the held-out side.
  c.eval_split = "test"
  # Share of prompts held out, by a hash of the prompt, where eval_path is "";
  # otherwise 0.
  c.held_out = 0.0
  # Parts of a directory or hub dataset, read in this order; () for a file or
  # all of a hub dataset.
  c.subsets = ()
  # Passes over this source's pairs in an epoch: 0.5 takes half of them and the
  # other half in the next epoch; 2.0 takes each twice.
  c.weight = 1.0
  # Hub ids and parquet only: read row by row, no further than a limit, instead
  # of fetching the whole dataset first.
  c.streaming = False
  # "shp" only: least ratio of the votes for chosen to those for rejected; 1
  # keeps all.
  c.min_score_ratio = 1.0
  # "shp" and "se" only: pairs of a prompt at most; 0 keeps all.
  c.max_pairs_per_prompt = 0
  return c


def filters() -> config_dict.ConfigDict:
  """Filters of every source; pairs left out are counted by reason."""
  c = config_dict.ConfigDict()
  # Keep only prompts with one human turn.
  c.single_turn = False
  # Human turns of a prompt at most; 0: any number.
  c.max_turns = 0
  # Characters (code points) of each response at least; white space at the ends
  # is not counted, here and in the next two.
  c.min_response_chars = 0
  # Characters of each response at most; 0: any number.
  c.max_response_chars = 0
  # Characters of a prompt at most; 0: any number.
  c.max_prompt_chars = 0
  # Drop repeated pairs instead of only counting them.
  c.drop_repeats = False
  # Malformed rows of a side that are counted and left out before it is an
  # error.
  c.skip_bad = 0
  return c


def known() -> config_dict.ConfigDict:
  """The known sources; a config may add others under any name."""
  return config_dict.ConfigDict(
    {"hh": hh(), "tfds": tfds(), "shp": shp(), "se": se(), "tldr": tldr()}
  )


def pairs(train: str, held_out: str) -> config_dict.ConfigDict:
  """Any JSONL of prompt, chosen, rejected; of transcripts; of messages."""
  c = source()
  c.train_path, c.eval_path = train, held_out
  return c


def hh(path: str = "Anthropic/hh-rlhf") -> config_dict.ConfigDict:
  """Anthropic's HH, all four subsets, with its own test split."""
  c = source()
  c.kind = "hh"
  c.train_path = c.eval_path = path
  c.subsets = (
    "harmless-base",
    "helpful-base",
    "helpful-online",
    "helpful-rejection-sampled",
  )
  return c


def tfds() -> config_dict.ConfigDict:
  """HH from array_record files with random access, written once by

  python -m dpo_jax.data.sources.hh_tfds --path=Anthropic/hh-rlhf \\
    --data_dir=data
  """
  c = hh()
  c.kind = "tfds"
  c.train_path = c.eval_path = "data"
  return c


def shp() -> config_dict.ConfigDict:
  """Stanford Human Preferences, with the score ratio of DPO's official code."""
  c = source()
  c.kind = "shp"
  c.train_path = c.eval_path = "stanfordnlp/SHP"
  c.min_score_ratio = 2.0
  return c


def se() -> config_dict.ConfigDict:
  """StackExchange, 22 GB, with 1% of its questions held out.

  One site is `subsets=("data/ai.stackexchange.com",)`.
  """
  c = source()
  c.kind = "se"
  c.train_path = "HuggingFaceH4/stack-exchange-preferences"
  c.eval_path = ""
  c.held_out = 0.01
  c.max_pairs_per_prompt = 10
  c.streaming = True
  return c


def tldr() -> config_dict.ConfigDict:
  """Reddit posts and pairs of summaries (Stiennon et al. 2020).

  From the hub's own conversion, since the dataset is defined by a script.
  """
  c = source()
  c.kind = "tldr"
  path = "openai/summarize_from_feedback@refs/convert/parquet"
  c.train_path = c.eval_path = path
  c.eval_split = "validation"
  c.subsets = ("comparisons",)
  return c

"""What leaves a machine does not say where on it things lay."""

import json
import pathlib

import pytest

from dpo_jax.publishing import portable


@pytest.fixture(autouse=True)
def home(monkeypatch):
  monkeypatch.setenv("HOME", "/data/people/jo")


@pytest.mark.parametrize(
  ("name", "shown"),
  [
    ("runs/sft/export", "runs/sft/export"),
    ("user/name@main", "user/name@main"),
    ("gs://bucket/home/sft", "gs://bucket/home/sft"),
    ("", ""),
    ("/data/people/jo/runs/sft/export", "sft/export"),
    ("/data/people/jo/sft", "sft"),
    ("/data/people/jo", ""),
    ("~/sft", "sft"),
    ("~", ""),
    ("/home/ann/sft", "sft"),
    ("/home/ann", ""),
    ("/Users/ann/my runs/sft", "my runs/sft"),
    ("/root/x", "x"),
    ("/mnt/disk/runs/sft/export", "sft/export"),
    ("/", ""),
  ],
)
def test_paths_by_hand(name, shown):
  assert portable.path(name) == shown
  assert portable.values({"a": [name, 1, None]}) == {"a": [shown, 1, None]}


def test_a_path_that_climbs_does_not_name_a_home(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  inner = tmp_path / "a" / "b"
  inner.mkdir(parents=True)
  monkeypatch.chdir(inner)
  assert portable.path(f"../../../{tmp_path.name}/sft") == "sft"
  assert portable.text(f"x=../../../{tmp_path.name}/sft y") == "x=sft y"


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    (
      "python train.py --config=configs/dpo.py:pythia-14m --workdir=runs/x",
      "python train.py --config=configs/dpo.py:pythia-14m --workdir=runs/x",
    ),
    (
      "python /data/people/jo/dpo/train.py --workdir=/mnt/a/b/run",
      "python dpo/train.py --workdir=b/run",
    ),
    (
      "python x.py '--workdir=/home/ann/my runs/x' --a=1/2",
      "python x.py '--workdir=my runs/x' --a=1/2",
    ),
    (
      "--config.data.use=\"('/mnt/a/b/c.jsonl',)\"",
      "--config.data.use=\"('b/c.jsonl',)\"",
    ),
    ("see https://host/a/b/c and ./here or and/or", None),
    ("at ~ann/x/y/z --w=~/x", "at y/z --w=x"),
  ],
)
def test_texts_by_hand(text, shown):
  assert portable.text(text) == (text if shown is None else shown)


def test_the_export_of_a_pushed_run_is_known_by_its_commit(tmp_path):
  export = tmp_path / "sft" / "export"
  export.mkdir(parents=True)
  assert portable.hub_name(str(export)) is None
  noted = {"user/steps": {"step-000002": {"commit": "0"}}}
  (tmp_path / "sft" / "hub.json").write_text(json.dumps(noted))
  assert portable.hub_name(str(export)) is None
  noted["user/sft"] = {"main": {"content": "x", "commit": "abc"}}
  (tmp_path / "sft" / "hub.json").write_text(json.dumps(noted))
  assert portable.hub_name(str(export)) == ("user/sft", "abc")
  # Another directory of the run is not what was pushed.
  assert portable.hub_name(str(export.with_name("other"))) is None
  assert portable.hub_name("user/name@v1") == ("user/name", "v1")


def test_an_adapter_names_its_base_or_none(tmp_path):
  source = tmp_path / "adapter_config.json"
  local = {"base_model_name_or_path": "/home/ann/sft", "revision": None, "r": 2}
  source.write_text(json.dumps(local))
  made = json.loads(portable.adapter(source, "/home/ann/sft"))
  assert made == {"base_model_name_or_path": None, "revision": None, "r": 2}
  made = json.loads(portable.adapter(source, "user/base@v2"))
  assert made["base_model_name_or_path"] == "user/base"
  assert made["revision"] == "v2"


def test_a_file_that_is_no_object_is_refused(tmp_path):
  path = pathlib.Path(tmp_path / "config.json")
  path.write_text("[1]")
  with pytest.raises(ValueError, match=r"config\.json"):
    portable.file(path)

"""Who may import whom, and which library stays in which file, from the AST.

A file imports only from lower levels. A new module must be put into the table
below: the test fails until it is.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpo_jax"

LEVELS = {
  "": 0,
  "__main__": 0,
  "comparisons": 0,
  "buckets": -2,
  "objects": -2,
  "config_files": -1,
  "config_help": 0,
  "console": 0,
  "errors": 0,
  "figures.house": 0,
  "guards": 0,
  "hardware": 0,
  "hf_layout": 0,
  "hlo_text": 0,
  "incidents": 0,
  "judging.markers": 0,
  "judging.templates": 0,
  "judging.verdicts": 0,
  "logps": 0,
  "draw": 0,
  "flash": 0,
  "kv_cache": 0,
  "lora": 0,
  "losses": 0,
  "markdown": 0,
  "metrics": 0,
  "page.prose": 0,
  "partitioning": 0,
  "portable": 0,
  "provenance": 0,
  "quantised": 0,
  "remote": -1,
  "redaction": 0,
  "safetensors_files": 0,
  "settings": 0,
  "sources.hub": 0,
  # Below all, since whoever opens a file may need them.
  "allocator": -1,
  "atomic": -1,
  "strict_json": -1,
  # Of `flash` alone.
  "flash_kernels": -1,
  # Of `logps` alone.
  "vocabulary": -1,
  "synthetic_tables": 0,
  "synthetic_text": 1,
  "tables": 0,
  "tokenizer": 0,
  "topology": 0,
  "winrates.calls": 0,
  "winrates.intervals": 0,
  "winrates.planning": 0,
  "attention": 1,
  "block_attention": 0,
  "cli": 1,
  "hlo": 3,
  "hlo_bytes": 2,
  "hlo_traffic": 1,
  "interruption": 1,
  "tracker_sinks": 1,
  "trackers": 2,
  "judging": 1,
  "optim": 1,
  "stops": 1,
  "peft_layout": 1,
  "processes": 1,
  "placement": 1,
  "settling": 2,
  "profiles": 1,
  "model_card": 1,
  "records": 1,
  "locks": 1,
  "row_store": 2,
  "sources.conversations": 1,
  "sources.files": 1,
  "sources.shp": 1,
  "sources.stack_exchange": 1,
  "sources.tldr": 1,
  "synthetic": 3,
  "synthetic_answers": 2,
  "synthetic_claims": 2,
  "winrates.__main__": 1,
  "winrates.lengths": 1,
  "winrates.ranking": 1,
  "winrates.rates": 1,
  "answer_files": 2,
  "answer_table": 2,
  "hub": 4,
  "pushing": 3,
  "revisions": 2,
  "hf_weights": 2,
  "judging.budget": 2,
  "judging.limits": 2,
  "judging.oracle": 4,
  "judging.prompts": 2,
  "judging.questions": 3,
  "judging.replies": 2,
  "model": 2,
  "packing": 2,
  "contents": 1,
  "lease": 2,
  "mirror": 4,
  "mirror.__main__": 4,
  "mirror.tables": 3,
  "rundir": 2,
  "step_files": 2,
  "sources.rows": 2,
  "token_cache": 2,
  "winrates.controls": 2,
  "batches": 3,
  "decoding": 4,
  "decoding_state": 3,
  "flops": 3,
  "hf": 3,
  "roofline": 4,
  "judging.controls": 4,
  "judging.fake_answers": 3,
  "judging.server": 3,
  "judging.transport": 3,
  "sources.hh_rlhf": 3,
  "steps": 3,
  "winrates": 3,
  "winrates.paired": 3,
  "checkpoint": 5,
  "checkpoint.__main__": 3,
  "eval_files": 4,
  "figures.layout": 4,
  "figures.rates": 4,
  "figures.runs": 4,
  "page.charts": 4,
  "judging.account": 4,
  "judging.client": 4,
  "judging.fake_batches": 4,
  "material": 4,
  "reference": 4,
  "slots": 5,
  "capacity": 4,
  "score": 5,
  "scored_pairs": 4,
  "sources": 4,
  "data": 5,
  "sampling": 6,
  "gates": 5,
  "figures": 5,
  "judging.batch_api": 5,
  "page.browse": 5,
  "judging.fake_server": 5,
  "judging.asking": 6,
  "answer_parts": 8,
  "answers": 9,
  "curves": 6,
  "grid": 7,
  "recipe": 7,
  "page": 6,
  "sections": 6,
  "checks": 8,
  "excerpts": 7,
  "feed": 8,
  "inspect_data": 8,
  "programs": 8,
  "judge_sections": 7,
  "judging.runner": 7,
  "assembly": 9,
  "manifest": 10,
  "mean_items": 8,
  "row_search": 0,
  "compiling": 9,
  "compose": 8,
  "drawings": 7,
  "compiling_answers": 10,
  "plan": 12,
  "plan_text": 11,
  "recount": 9,
  "samples": 10,
  "training": 11,
  "report": 10,
  "replicate": 12,
  "verify": 11,
  "differences": 0,
}

# The only modules that may import a library; everything else stays plain JAX
# and NumPy.
CONFINED = {
  "absl": {"cli"},
  "bs4": {"sources.stack_exchange"},
  "datasets": {"sources.hub"},
  "etils": {"buckets"},
  "flax": {"model"},
  "grain": {"batches", "sources.hh_rlhf"},
  "httpx2": {"judging.client", "judging.transport"},
  "huggingface_hub": {"hub", "pushing", "remote"},
  "markdown_it": {"page.prose"},
  "matplotlib": {"figures.house", "tracker_sinks"},
  "ml_collections": {"cli", "config_help"},
  "openai": {"judging.client"},
  "orbax": {"checkpoint"},
  "safetensors": {"safetensors_files"},
  "scipy": {
    "winrates.controls",
    "winrates.intervals",
    "winrates.lengths",
    "winrates.paired",
    "winrates.planning",
    "winrates.ranking",
  },
  "tensorboardX": {"tracker_sinks"},
  "tensorstore": {"objects"},
  "tensorflow_datasets": {"sources.hh_rlhf"},
  "tokenizers": {"tokenizer"},
  "transformers": {"tokenizer"},
  "wandb": {"tracker_sinks"},
}
# Imported nowhere: only tests compare with torch, and nothing is unpickled.
NEVER = {"peft", "pickle", "tensorflow", "torch"}
# Free to all.
COMMON = {"dpo_jax", "jax", "numpy", "optax", "tqdm"}
# Imported inside the function that needs them: missing or slow to import.
LAZY = {
  "bs4",
  "datasets",
  "etils",
  "grain",
  "httpx2",
  "huggingface_hub",
  "markdown_it",
  "openai",
  "tensorboardX",
  "tensorstore",
  "tensorflow_datasets",
  "tokenizers",
  "transformers",
  "wandb",
}


def module_of(path):
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")}
SCRIPTS = {
  path.name: path for path in ROOT.glob("*.py") if path.stem != "setup"
}


def imports(path):
  """(dotted module, where it stands: "top" or "function") of a file."""
  tree = ast.parse(path.read_text("utf-8"))
  found = []

  def visit(node, where):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      where = "function"
    if isinstance(node, ast.Import):
      found.extend((alias.name, where) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative import"
      found.extend((f"{node.module}:{a.name}", where) for a in node.names)
    for child in ast.iter_child_nodes(node):
      visit(child, where)

  visit(tree, "top")
  return found


def ours(path):
  """The modules of the package that a file imports, by their short names."""
  found = set()
  for name, _ in imports(path):
    module, _, attribute = name.partition(":")
    if module.split(".")[0] != "dpo_jax":
      continue
    short = module.removeprefix("dpo_jax").removeprefix(".")
    if attribute:
      short = f"{short}.{attribute}".removeprefix(".")
      assert short in FILES, f"{path} imports a name, not a module: {name}"
    found.add(short)
  return found


def test_the_table_lists_just_the_modules():
  assert set(LEVELS) == set(FILES)


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_only_from_lower_levels(module):
  level = LEVELS[module]
  for other in ours(FILES[module]):
    assert LEVELS[other] < level, (
      f"{module} (level {level}) imports {other} (level {LEVELS[other]})"
    )


@pytest.mark.parametrize("module", sorted(FILES))
def test_libraries_stay_where_they_belong(module):
  for name, where in imports(FILES[module]):
    library = name.split(":")[0].split(".")[0]
    assert library not in NEVER, f"{module} imports {library}"
    if library in CONFINED:
      assert module in CONFINED[library], f"{module} imports {library}"
    else:
      assert library in COMMON | sys.stdlib_module_names, (
        f"{module} imports {library}, which no table of this test names"
      )
    if library in LAZY:
      assert where == "function", f"{module} imports {library} at its top"


def test_every_confined_library_is_used():
  used = {
    (name.split(":")[0].split(".")[0], module)
    for module, path in FILES.items()
    for name, _ in imports(path)
  }
  for library, modules in CONFINED.items():
    assert {(library, module) for module in modules} <= used


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_are_thin(script):
  path = SCRIPTS[script]
  assert len(path.read_text("utf-8").splitlines()) <= 40
  libraries = {name.split(":")[0].split(".")[0] for name, _ in imports(path)}
  assert libraries <= {"dpo_jax"} | sys.stdlib_module_names
  assert ours(path) <= set(FILES)


def test_configs_are_only_values():
  for path in (ROOT / "configs").glob("*.py"):
    libraries = {name.split(":")[0].split(".")[0] for name, _ in imports(path)}
    assert libraries <= {"configs", "ml_collections"}, path.name

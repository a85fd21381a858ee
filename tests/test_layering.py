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
  "answering": -9,
  "engine": -9,
  "interface": -9,
  "planning": -9,
  "reporting": -9,
  "rows": -9,
  "running": -9,
  "storage": -9,
  "world": -9,
  "publishing": -9,
  "weights": -9,
  "": 0,
  "__main__": 0,
  "comparisons": 0,
  "mirror.objects": -2,
  "interface.config_files": -1,
  "interface.config_help": 0,
  "interface.console": 0,
  "interface.errors": 0,
  "figures.house": 0,
  "running.guards": 0,
  "hardware": 0,
  "weights.hf_layout": 0,
  "judging.verdicts": 2,
  "engine.draw": 0,
  "attention.cached": -1,
  "attention.shared": 0,
  "attention.flash": 0,
  "engine.kv_cache": 0,
  "lora": 0,
  "losses": 0,
  "interface.markdown": 0,
  "metrics": 0,
  "reporting.page.prose": 0,
  "partitioning": 0,
  "running.provenance": 0,
  "quantised": 0,
  "storage.remote": -1,
  "interface.redaction": 0,
  "weights.safetensors_files": 0,
  "interface.settings": -1,
  "sources.hub": 0,
  # Below all, since whoever opens a file may need them.
  "storage.atomic": -1,
  "storage.strict_json": -1,
  # Of whoever traces a model.
  "precision": -2,
  "world.synthetic_tables": 0,
  "world.synthetic_text": 1,
  "rows.tables": 0,
  "tokenizer": 0,
  "planning.topology": 0,
  "winrates.calls": 0,
  "winrates.intervals": 0,
  "logps": 1,
  "attention": 1,
  "blocks": 1,
  "attention.block_attention": 0,
  "interface.cli": 1,
  "running.interruption": 1,
  "trackers": 2,
  "judging": 1,
  "optim": 1,
  "engine.stops": 1,
  "weights.peft_layout": 1,
  "running.processes": 1,
  "rows.placement": 1,
  "rows.settling": 2,
  "rows.profiles": 1,
  "publishing.model_card": 1,
  "records": 1,
  "storage.locks": 1,
  "storage.row_store": 2,
  "sources.conversations": 1,
  "sources.files": 1,
  "sources.shp": 1,
  "sources.stack_exchange": 1,
  "sources.tldr": 1,
  "synthetic": 3,
  "world.synthetic_answers": 2,
  "world.synthetic_claims": 2,
  "winrates.rates": 1,
  "answering.answer_files": 8,
  "answering.answer_table": 2,
  "hub": 4,
  "weights.hf_weights": 2,
  "judging.budget": 2,
  "judging.limits": 2,
  "judging.rewards": 4,
  "judging.prompts": 2,
  "judging.questions": 3,
  "model": 2,
  "rows.packing": 2,
  "mirror.contents": 1,
  "mirror.lease": 2,
  "mirror": 4,
  "mirror.__main__": 4,
  "mirror.tables": 3,
  "storage.rundir": 2,
  "storage.step_files": 2,
  "sources.rows": 2,
  "rows.token_cache": 2,
  "winrates.controls": 2,
  "batches": 3,
  "engine.decoding": 3,
  "flops": 3,
  "hf": 3,
  "judging.controls": 4,
  "judging.transport": 3,
  "sources.hh_rlhf": 3,
  "steps": 3,
  "winrates": 3,
  "winrates.paired": 3,
  "checkpoint": 5,
  "checkpoint.__main__": 3,
  "reporting.seed_files": 4,
  "figures.layout": 4,
  "figures.rates": 4,
  "figures.runs": 4,
  "judging.account": 5,
  "judging.client": 4,
  "reporting.material": 4,
  "running.reference": 4,
  "engine.slots": 5,
  "engine.capacity": 4,
  "score": 5,
  "sources": 4,
  "data": 5,
  "sampling": 6,
  "reporting.gates": 5,
  "figures": 6,
  "judging.batch_api": 5,
  "reporting.page.browse": 5,
  "answering.answers": 9,
  "answering.grid": 7,
  "running.recipe": 7,
  "reporting.page": 8,
  "reporting.sections": 6,
  "running.checks": 8,
  "reporting.excerpts": 7,
  "running.feed": 8,
  "inspect_data": 8,
  "running.programs": 8,
  "judging.runner": 7,
  "running.assembly": 9,
  "running.loop": 11,
  "running.manifest": 10,
  "planning.mean_items": 8,
  "planning.compiling": 9,
  "reporting.compose": 9,
  "planning.compiling_answers": 10,
  "plan": 12,
  "planning.plan_text": 11,
  "running.samples": 10,
  "training": 12,
  "report": 10,
  "replicate": 13,
  "verify": 11,
  "planning.lower_bound": 10,
  "storage.hashing": -3,
}

# The only modules that may import a library; everything else stays plain JAX
# and NumPy.
CONFINED = {
  "absl": {"interface.cli"},
  "bs4": {"sources.stack_exchange"},
  "datasets": {"sources.hub"},
  "etils": {"storage.remote"},
  "flax": {"blocks"},
  "grain": {"batches", "sources.hh_rlhf"},
  "httpx2": {"judging.client", "judging.transport"},
  "huggingface_hub": {"hub", "storage.remote"},
  "markdown_it": {"reporting.page.prose"},
  "matplotlib": {"figures.house"},
  "ml_collections": {"interface.cli", "interface.config_help"},
  "openai": {"judging.client"},
  "orbax": {"checkpoint"},
  "safetensors": {"weights.safetensors_files"},
  "scipy": {
    "winrates.controls",
    "winrates.intervals",
    "winrates.paired",
    "winrates.rates",
  },
  "tensorboardX": {"trackers"},
  "tensorstore": {"mirror.objects"},
  "tensorflow_datasets": {"sources.hh_rlhf"},
  "tokenizers": {"tokenizer"},
  "transformers": {"tokenizer"},
  "wandb": {"trackers"},
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
    # scipy.stats takes most of a second, which each report would begin with.
    if library == "scipy":
      assert name == "scipy:special", f"{module} imports {name}"


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

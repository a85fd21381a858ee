"""Every field of a training run; any is a flag: --config.loss.beta=0.2."""

from ml_collections import config_dict

from configs import data as sources

# The projections of a GPT-NeoX block, by their Hugging Face names.
PROJECTIONS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def training() -> config_dict.ConfigDict:
  """All fields of a training run."""
  c = config_dict.ConfigDict()
  # "sft": fine-tune on chosen responses. "dpo": train on pairs.
  c.objective = "sft"
  # Of data order, LoRA's initialization and dropout.
  c.seed = 0
  # Directory with tokenizer.json, or a model id on the hub.
  c.tokenizer = "EleutherAI/pythia-2.8b"
  c.model = model()
  c.lora = lora()
  c.data = data()
  c.loss = loss()
  c.optimizer = optimizer()
  c.mesh = mesh()
  c.guards = guards()
  c.samples = samples()
  # Pairs (SFT: examples) per update, over all devices.
  c.batch_size = 64
  # Gradient accumulation: the batch in this many micro-batches. Changes memory,
  # not the numbers.
  c.microbatches = 1
  # Passes over the training data.
  c.epochs = 1
  # Stop after this many updates; 0: after all epochs.
  c.max_steps = 0
  # Updates between evaluations on held-out rows, besides those before the first
  # update and after the last; 0: only those.
  c.eval_every = 100
  # Pairs (SFT: examples) per evaluation batch.
  c.eval_batch_size = 64
  # Updates between checkpoints, besides the one at the end; 0: only that.
  c.checkpoint_every = 300
  # Keep this many of the newest checkpoints; 0: all.
  c.keep_checkpoints = 2
  # "gs://bucket/path" (extra `gcs`), for this run alone: checkpoints, the run's
  # records and the model are uploaded, and a new machine resumes from there. A
  # failed upload stops nothing and is retried. "" uploads nothing.
  c.checkpoint_bucket = ""
  # Write a PEFT adapter directory at every checkpoint, to sample from or to
  # push; never deleted. Needs LoRA.
  c.export_adapters = False
  # DPO only: compute the reference's log-probs once, before training. Faster
  # steps, no second copy of the weights in full fine-tuning. Equal in float32;
  # in bfloat16 a pair's log-ratio may differ by some tenths of a nat.
  c.precompute_reference = False
  # Directory of those log-probs, shared by runs with the same pairs and
  # reference; "" is the run's own.
  c.reference_cache = ""
  # Seconds after SIGTERM, SIGINT or SIGHUP within which a run saves and stops
  # by itself, before it is ended. A Spot VM is gone after 30.
  c.grace_s = 25.0
  # Whole seconds without a heartbeat after which the other processes of a run
  # end.
  c.heartbeat_s = 100
  # What may differ from earlier starts when a run resumes: fields,
  # ("loss.beta",), or inputs: "train_data", "held_out_data", "tokenizer",
  # "base", "position" (the order of items), "randomness".
  c.allow_changes = ()
  c.trackers = trackers()
  # "user/name" on the Hugging Face hub: the model is pushed at the end, with a
  # card, and the adapters of export_adapters to branches step-NNNNNN. A failed
  # push stops nothing and is retried. "" pushes nothing.
  c.push_to_hub = ""
  # Whether a new repository is public.
  c.push_public = False
  # License of the pushed weights, such as "apache-2.0"; "" states none.
  c.push_license = ""
  # Only write what would be pushed to push/ in the run's directory.
  c.push_dry_run = False
  return c


def trackers() -> config_dict.ConfigDict:
  """Trackers of metrics, in addition to metrics.jsonl."""
  c = config_dict.ConfigDict()
  # Any of "csv" (metrics.csv), "tensorboard" (tensorboard/, needs the extra
  # `tb`) and "wandb" (Weights & Biases, needs the extra `wandb`).
  c.use = ()
  # W&B project.
  c.wandb_project = "dpo_jax"
  # "online" needs WANDB_API_KEY or `wandb login`; "offline" keeps the run in
  # wandb/, for `wandb sync`.
  c.wandb_mode = "online"
  return c


def samples() -> config_dict.ConfigDict:
  """Responses to held-out prompts during training, into samples.jsonl."""
  c = config_dict.ConfigDict()
  # Prompts, the first of the held-out rows (of every source in turn), decoded
  # as one batch; 0: none.
  c.prompts = 0
  # Updates between samplings, besides those before the first update and after
  # the last; 0: only those.
  c.every = 100
  # 0 is greedy.
  c.temperature = 1.0
  # Most tokens of a response, EOS included.
  c.max_new_tokens = 128
  # A longer prompt keeps its last tokens.
  c.max_prompt_tokens = 256
  return c


def model() -> config_dict.ConfigDict:
  """Base weights and how they compute."""
  c = config_dict.ConfigDict()
  # Directory in Hugging Face form (safetensors), user/name or
  # user/name@revision on the hub, or gs://bucket/path.
  c.path = "EleutherAI/pythia-2.8b"
  # Compute dtype of the blocks and their gradients: "float32" or "bfloat16".
  # Norms, softmax, log-probs, losses, sums over micro-batches, moments and
  # updates are float32 in any case. Float32 products are exact on every device,
  # unless JAX_DEFAULT_MATMUL_PRECISION says otherwise, and cost a TPU six of
  # bfloat16.
  c.dtype = "bfloat16"
  # Dtype of the stored base weights. Full fine-tuning needs "float32". With
  # LoRA "bfloat16" halves their memory, and "int8" takes about a quarter:
  # kernels of blocks in eight bits, embeddings in bfloat16. Policy and
  # reference share the rounded base; adapters are merged into the weights as
  # read ("bfloat16": rounded). See benchmarks/int8.md.
  c.param_dtype = "float32"
  # Rematerialization: "none" recomputes nothing in the backward pass;
  # "save_projections" saves the outputs of the four frozen projections per
  # layer; "full" saves one activation per layer. Less memory is slower; the
  # numbers are equal.
  c.remat = "full"
  # "dense" runs everywhere and holds row_length x row_length scores per row and
  # head. "blocks" packs segments across rows of `attention_block` tokens and
  # computes only pairs of rows with visible entries: the fastest on a CPU.
  # "flash", for TPUs and NVIDIA GPUs, holds no scores and skips masked blocks.
  # "cudnn" is NVIDIA's, in bfloat16. "flash_interpreted" checks flash on any
  # device, slowly. See benchmarks/attention.md.
  c.attention = "dense"
  # Tokens of a row under "blocks"; 64 and 128 are equally fast on a CPU.
  c.attention_block = 64
  # Completion tokens per device whose logits exist at one time, 8 bytes each
  # per vocabulary entry: 0.4 GB for Pythia at 1,024. 128 to 512 are fast on a
  # CPU.
  c.logit_chunk = 1024
  # Vocabulary entries whose logits exist at one time; 0 is all, as required
  # where mesh.tensor splits the vocabulary. About 1,000, with logit_chunk in
  # the thousands, is fast and lean on a CPU.
  c.vocab_tile = 0
  return c


def lora() -> config_dict.ConfigDict:
  """Low-rank adapters."""
  c = config_dict.ConfigDict()
  # 0 trains all weights instead of adapters.
  c.rank = 0
  # Adapters are scaled by alpha / rank.
  c.alpha = 32.0
  # Dropout rate of the adapters' inputs in training.
  c.dropout = 0.1
  # Projections with adapters.
  c.targets = PROJECTIONS
  # "rslora" scales adapters by alpha / sqrt(rank).
  c.scaling = "lora"
  # PEFT adapter of the model, a directory or hub id, from which training begins
  # and which the reference has; "": from zero, and the reference has none.
  c.path = ""
  return c


def data() -> config_dict.ConfigDict:
  """Sources, tokenization and packing."""
  c = config_dict.ConfigDict()
  # Names of the `sources` to read; several are mixed.
  c.use = ("hh",)
  c.sources = sources.known()
  c.filters = sources.filters()
  # Keep the first training pairs of each source; 0 keeps all.
  c.max_train = 0
  # Keep the first held-out pairs; 0 keeps all.
  c.max_eval = 256
  # Whether a held-out prompt may also be in the training data; HH has a few.
  c.allow_leakage = True
  # How texts are tokenized and truncated. "paper": the official DPO code;
  # "trl": TRL's DPOTrainer; "dpo-replication": that system. See
  # dpo_jax/data/tokenization.py.
  c.tokenization = "paper"
  # Most tokens of a prompt with its response, EOS included.
  c.max_length = 512
  # Last tokens that a prompt keeps: under "paper" if prompt and response are
  # too long, under "dpo-replication" always. 0 under "trl", which truncates
  # both as one.
  c.max_prompt_length = 256
  # Cache of token ids, by fingerprints of texts, tokenizer and tokenization; ""
  # keeps none.
  c.token_cache = "~/.cache/dpo_jax/tokens"
  # SFT only. "chosen", or "both": each response of a pair is an example, plain
  # language modeling of the mixed text.
  c.responses = "chosen"
  # SFT only: loss on the prompt's tokens too.
  c.loss_on_prompt = False
  # What a row holds. "padded": one sequence; "packed": several; "shared" (pairs
  # only): several pairs, with one copy of the prompt for both responses.
  # Changes speed, not the numbers.
  c.layout = "packed"
  # Tokens of a row. Twice max_length always holds a pair. Under
  # model.attention="blocks" rows are shorter, and this bounds the longest pair.
  c.row_length = 1024
  # Most batch shapes of a run, each a compiled step: more pad less and compile
  # longer.
  c.shapes = 4
  return c


def loss() -> config_dict.ConfigDict:
  """The preference loss."""
  c = config_dict.ConfigDict()
  # DPO only. "sigmoid" is DPO; docs/losses.md has all kinds. A weighted sum is
  # "sigmoid+0.2*sft".
  c.kind = "sigmoid"
  # Strength of the KL penalty towards the reference.
  c.beta = 0.1
  # Assumed rate of swapped labels: in "sigmoid", conservative DPO.
  c.label_smoothing = 0.0
  # Divide log-ratios by their responses' tokens: for "ipo" as in TRL, for
  # "sigmoid" as in Tulu 3.
  c.per_token = False
  # SimPO's target margin of rewards.
  c.gamma = 0.0
  # "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
  c.divergence = "reverse_kl"
  # Of the alpha-divergence; 1 is the reverse KL.
  c.divergence_alpha = 0.5
  # LD-DPO: the weight of tokens past the length of the pair's shorter response.
  c.ld_alpha = 1.0
  # WPO: weigh each pair by how likely the policy is to write its responses.
  c.wpo = False
  # KTO: weight of undesirable responses; desirable ones have 1.
  c.undesirable_weight = 1.0
  return c


def optimizer() -> config_dict.ConfigDict:
  """Optimizer and learning-rate schedule."""
  c = config_dict.ConfigDict()
  # "adamw" and "rmsprop" have torch's rules; or "lion", "adafactor", or "muon",
  # which has AdamW for embeddings and vectors.
  c.name = "rmsprop"
  # Peak, after warm-up.
  c.learning_rate = 5e-7
  # After warm-up: "constant", or "linear" or "cosine" to zero one update after
  # the last.
  c.schedule = "constant"
  # Updates of linear warm-up; the first has learning_rate / warmup_steps.
  c.warmup_steps = 150
  # The same as a share of all updates, rounded up; warmup_steps is then 0.
  c.warmup_ratio = 0.0
  # Not of biases and layer norms; rmsprop and adafactor have none.
  c.weight_decay = 0.0
  # Decay rate of the first moment, the momentum; rmsprop and adafactor have
  # none.
  c.b1 = 0.9
  # Decay rate of the second moment; for rmsprop, torch's alpha. Adafactor's
  # rises with the steps.
  c.b2 = 0.99
  # Added to the root of the second moment.
  c.eps = 1e-8
  # Gradients are clipped to this global norm.
  c.clip_norm = 10.0
  return c


def guards() -> config_dict.ConfigDict:
  """Updates that are not finite, which are never applied."""
  c = config_dict.ConfigDict()
  # If loss or gradient norm is not finite: "stop" the run, or "skip" the
  # update. Its items are skipped_items in metrics.jsonl.
  c.not_finite = "stop"
  # Stop after more skipped updates than this, over the whole run.
  c.max_skipped = 10
  return c


def mesh() -> config_dict.ConfigDict:
  """Devices along each axis of the mesh."""
  c = config_dict.ConfigDict()
  # Splits the batch. -1, on one axis, takes the remaining devices.
  c.data = -1
  # Splits the batch and the weights.
  c.fsdp = 1
  # Splits heads, MLP and vocabulary.
  c.tensor = 1
  return c

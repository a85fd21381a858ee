"""Every field of a training run, with what it means.

configs/sft.py, configs/dpo.py and configs/demo.py start from `training()` and
change what their recipe needs. Any field can be changed on the command line:
`--config.loss.beta=0.2`.
"""

from ml_collections import config_dict

from configs import data as sources

# The projections of a GPT-NeoX block, by their Hugging Face names.
PROJECTIONS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def training() -> config_dict.ConfigDict:
  """All fields of a training run."""
  c = config_dict.ConfigDict()
  # "sft": fine-tune on chosen responses. "dpo": train on pairs.
  c.objective = "sft"
  # Decides data order, LoRA's initial values and dropout.
  c.seed = 0
  # Directory with tokenizer.json, or the id of a model on the hub.
  c.tokenizer = "EleutherAI/pythia-2.8b"
  c.model = model()
  c.lora = lora()
  c.data = data()
  c.loss = loss()
  c.optimizer = optimizer()
  c.mesh = mesh()
  c.guards = guards()
  c.samples = samples()
  # Pairs (SFT: examples) of one update, over all devices.
  c.batch_size = 64
  # Into how many parts a batch is split, one after another on the device:
  # gradient accumulation. It changes memory, not the numbers.
  c.microbatches = 1
  # Passes over the training pairs.
  c.epochs = 1
  # Stop after so many updates; 0: after all epochs.
  c.max_steps = 0
  # Updates between evaluations on the held-out rows; there is always one
  # before the first update and one after the last. 0: only those.
  c.eval_every = 100
  # Pairs (SFT: examples) of one evaluation batch.
  c.eval_batch_size = 64
  # Updates between checkpoints; there is always one at the end. 0: only that.
  c.checkpoint_every = 300
  # How many of the newest checkpoints are kept to resume from; 0: all.
  c.keep_checkpoints = 2
  # Also keep those whose step is a multiple of it; 0: no such rule.
  c.keep_every = 0
  # Also keep so many with the best `best_metric` of the evaluation at their
  # step; 0: no such rule.
  c.keep_best = 0
  # "eval_loss"; DPO also "eval_rewards/accuracies", "eval_rewards/margins" and
  # the others that metrics.jsonl has.
  c.best_metric = "eval_loss"
  # Which of its ends is the best: "lowest" or "highest".
  c.best_is = "lowest"
  # "gs://bucket/path" (with the extra gcs), a path for this run alone: each
  # checkpoint is uploaded there with the run's records, and at the end the
  # model. On a new machine, whose disk has nothing of it, the same command
  # resumes from there. An upload that fails stops nothing; the next one makes
  # up for it. "" uploads nothing.
  c.checkpoint_bucket = ""
  # Write a PEFT adapter directory at every checkpoint, to sample from. These
  # are never deleted. Needs LoRA.
  c.export_adapters = False
  # DPO only: compute the reference's log-probs once, before training, and read
  # them with the pairs. Each epoch is then faster, and full fine-tuning needs
  # no second copy of the weights. In float32 the numbers are the same; in
  # bfloat16 a pair's may be off by some tenths of a nat, since they were
  # computed in other batches.
  c.precompute_reference = False
  # Directory that they are kept in, to be shared by runs on the same pairs and
  # the same reference; "" is the run's own.
  c.reference_cache = ""
  # Directory that compiled programs are kept in, so that the same run starts at
  # once when it starts again; "" keeps none. Where JAX_COMPILATION_CACHE_DIR is
  # set, it is that one instead.
  c.compilation_cache = "~/.cache/dpo_jax/xla"
  # Under glibc: keep the host's memory that was freed and use it again, instead
  # of having it mapped and faulted in anew. On a CPU, where each step's
  # temporary memory is such, a step of the smallest models is quicker by a
  # tenth to a half, at about the same peak memory. What the environment sets by
  # MALLOC_* or GLIBC_TUNABLES is left alone.
  c.keep_freed_memory = True
  # Seconds after SIGTERM, SIGINT or SIGHUP in which a run saves and stops by
  # itself; then it is ended. What was committed is whole either way. A Spot VM
  # is gone after 30.
  c.grace_s = 25.0
  # How long, in seconds, a process of several may not be heard of until the
  # others take it for dead and end; whole seconds.
  c.heartbeat_s = 100
  # What may differ from what the directory was begun with as a run goes on:
  # fields, ("loss.beta",), or inputs of the same name with other content:
  # "train_data", "held_out_data", "tokenizer", "base", "position" (the order
  # of items), "randomness". Each change is recorded in manifest.json.
  c.allow_changes = ()
  c.trackers = trackers()
  # "user/name" on the Hugging Face hub: the model is pushed there at the end,
  # with a card, and each checkpoint to a branch step-NNNNNN. A push that fails
  # stops nothing and is tried again at the end. "" pushes nothing.
  c.push_to_hub = ""
  # Whether everybody sees a repository that is made.
  c.push_public = False
  # Of the pushed weights, such as "apache-2.0"; "" states none.
  c.push_license = ""
  # Push the checkpoints too. Those of a run that trains all weights take as
  # much disk as the model until they are pushed; two may wait.
  c.push_checkpoints = True
  # Only write what would be pushed, to push/ in the run's directory.
  c.push_dry_run = False
  return c


def trackers() -> config_dict.ConfigDict:
  """Where metrics go beside metrics.jsonl, which is always written."""
  c = config_dict.ConfigDict()
  # Any of "csv" (metrics.csv), "tensorboard" (tensorboard/, needs the extra
  # `tb`) and "wandb" (Weights & Biases, needs the extra `wandb`).
  c.use = ()
  # Project of W&B that the run belongs to.
  c.wandb_project = "dpo_jax"
  # "online" needs a key in WANDB_API_KEY or W&B's own store; "offline" keeps
  # the run in wandb/, for `wandb sync`.
  c.wandb_mode = "online"
  return c


def samples() -> config_dict.ConfigDict:
  """Answers to held-out prompts as training goes on, into samples.jsonl."""
  c = config_dict.ConfigDict()
  # How many prompts are answered, the first of the held-out rows (of every
  # source in turn); all are decoded at once. 0: none.
  c.prompts = 0
  # Updates between two samplings; there is always one before the first update
  # and one after the last. 0: only those.
  c.every = 100
  # 0 is greedy.
  c.temperature = 1.0
  # Draw among the k likeliest tokens; 0 is off.
  c.top_k = 0
  # Draw among the likeliest tokens that together reach this probability; 1.0
  # is off.
  c.top_p = 1.0
  # Tokens of an answer at most, EOS included.
  c.max_new_tokens = 128
  # A longer prompt keeps its last so many tokens.
  c.max_prompt_tokens = 256
  return c


def model() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # Directory in Hugging Face form (safetensors), or the id of a hub model:
  # user/name, or user/name@revision; or gs://bucket/path.
  c.path = "EleutherAI/pythia-2.8b"
  # What the blocks compute in: "float32" or "bfloat16". Norms, softmax,
  # log-probs and losses are float32 whatever it says. Products of float32 are
  # rounded on no device, unless JAX_DEFAULT_MATMUL_PRECISION asks for it, and
  # cost a TPU six of bfloat16. Gradients of the blocks' weights are formed in
  # it, and summed in it over a mesh's devices; sums over micro-batches, moments
  # and updates are float32.
  c.dtype = "bfloat16"
  # What base weights are stored in. Full fine-tuning needs float32. With LoRA
  # "bfloat16" takes half the memory, and "int8" about a quarter: kernels of
  # blocks have eight bits and a scale for each output channel, embeddings are
  # bfloat16. Policy and reference share the rounded base; adapters are merged
  # into the weights as they were read, which at "bfloat16" means rounded to it.
  # What it costs in quality was measured on a small model only:
  # benchmarks/int8.md.
  c.param_dtype = "float32"
  # What the backward pass finds: "none" recomputes nothing; "save_projections"
  # keeps the outputs of the four frozen projections of a layer and recomputes
  # what lies between them, attention's scores first; "full" keeps one
  # activation a layer. The less, the slower; the numbers are the same.
  c.remat = "full"
  # Which code attends. "dense" runs everywhere; it holds scores of row_length x
  # row_length for each row and head, and is what the recipes for TPUs and GPUs
  # say, since the others have not run on one yet. "blocks" cuts rows of
  # `attention_block` tokens that pairs run through, instead of data.row_length,
  # and leaves out what is hidden: the quick one on a CPU. "flash", for TPUs and
  # NVIDIA GPUs, holds no scores and leaves out what is hidden.
  # benchmarks/attention.md compares them. "cudnn" is NVIDIA's, in bfloat16.
  # What the devices cannot run is refused before anything compiles.
  # "flash_interpreted" checks flash on any device, slowly.
  c.attention = "dense"
  # Tokens of a row under "blocks"; 64 and 128 are equally quick on a CPU.
  c.attention_block = 64
  # Completion tokens of a device whose logits exist at one time, each 8 bytes
  # a word: 0.4 GB for Pythia's vocabulary at 1,024. It changes memory and
  # speed, not the numbers: on a CPU 128 to 512 are quick.
  c.logit_chunk = 1024
  # Words whose logits exist at one time, a tile of the vocabulary after
  # another; 0 is all, as it must be where mesh.tensor splits the vocabulary. On
  # a CPU about 1,000, with logit_chunk at thousands, is quick and lean: the
  # unembedding is read once for all tokens.
  c.vocab_tile = 0
  return c


def lora() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # 0 trains all weights instead of adapters.
  c.rank = 0
  # The branch is scaled by alpha / rank.
  c.alpha = 32.0
  # Share of the branch's inputs that is dropped in training.
  c.dropout = 0.1
  # Which projections carry adapters.
  c.targets = PROJECTIONS
  return c


def data() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # Which of `sources` are read, by their names; several are mixed.
  c.use = ("hh",)
  c.sources = sources.known()
  c.filters = sources.filters()
  # Keep the first so many training pairs of each source; 0 keeps all.
  c.max_train = 0
  # Keep the first so many held-out pairs; 0 keeps all.
  c.max_eval = 256
  # Whether held-out prompts may also be trained on; HH has a few.
  c.allow_leakage = True
  # How texts become ids, and what is cut. "paper": the official DPO code;
  # "trl": TRL's DPOTrainer; "dpo-replication": the dpo-replication system. See
  # dpo_jax/data/tokenization.py.
  c.tokenization = "paper"
  # Tokens of a prompt with its response, EOS included.
  c.max_length = 512
  # Tokens that a prompt keeps, its last ones: under "paper" where prompt and
  # response are too long, under "seed" always; "trl" cuts both as one: 0.
  c.max_prompt_length = 256
  # Where token ids are kept from run to run, by fingerprints of texts,
  # tokenizer and tokenization rules; "" keeps none.
  c.token_cache = "~/.cache/dpo_jax/tokens"
  # SFT only. "chosen", or "both": each answer of a pair is an example, which
  # is plain language modelling on the mixed text.
  c.responses = "chosen"
  # SFT only: learn to predict the prompt too.
  c.loss_on_prompt = False
  # "padded": a sequence a row. "packed": several sequences a row. "shared"
  # (pairs only): one copy of the prompt for both responses, several pairs a
  # row. It changes speed, not the numbers.
  c.layout = "packed"
  # Tokens of a row. Twice max_length always holds a pair. Under
  # model.attention "blocks" rows are shorter, and this is the longest pair.
  c.row_length = 1024
  # Shapes of batches, and so compiled steps, that a run may have: more waste
  # less and compile longer.
  c.shapes = 4
  return c


def loss() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # DPO only. "sigmoid" is DPO; "ipo_sum" is IPO on summed log-probs, as in the
  # official code; "ipo_mean" on their means over tokens, as in TRL; "hinge".
  c.kind = "sigmoid"
  # Strength of the KL penalty towards the reference.
  c.beta = 0.1
  # Assumed rate of swapped labels (conservative DPO); sigmoid only.
  c.label_smoothing = 0.0
  return c


def optimizer() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # "adamw" or "rmsprop", both with torch's rules.
  c.name = "rmsprop"
  # At its highest, after the warm-up.
  c.learning_rate = 5e-7
  # After the warm-up: "constant", or "cosine", which would be zero one update
  # after the last.
  c.schedule = "constant"
  # Updates of linear warm-up; the first one already has lr / warmup_steps.
  c.warmup_steps = 150
  # AdamW only; biases and layer norms are spared.
  c.weight_decay = 0.0
  # AdamW's decay rate of the first moment.
  c.b1 = 0.9
  # Decay rate of the second moment; for rmsprop, torch's alpha.
  c.b2 = 0.99
  # Is added to the root of the second moment.
  c.eps = 1e-8
  # Gradients whose global norm is greater are scaled down to it.
  c.clip_norm = 10.0
  return c


def guards() -> config_dict.ConfigDict:
  """What is done about an update that would do harm; none is ever made."""
  c = config_dict.ConfigDict()
  # Where the loss or the gradient's norm is not finite: "stop" the run, or
  # "skip" the update and go on. The items are written to skipped_updates.jsonl.
  c.not_finite = "stop"
  # Stop after more skipped updates than these, over the whole run.
  c.max_skipped = 10
  return c


def mesh() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  # Devices along each axis; -1, once, takes what the others leave. This one
  # splits the batch.
  c.data = -1
  # Splits the batch and the weights.
  c.fsdp = 1
  # Splits heads, MLP and vocabulary.
  c.tensor = 1
  return c

"""Set up a run: load its settings, dataset and initial model, and print them."""
import re
from dataclasses import fields, replace

import torch

import config
import model as gpt
from config import UserError
from data.datasets import folder_tokenizer, open_dataset, read_meta
from data.tokenizer import get_tokenizer
from runtime import resume
from runtime.checkpoint import load_model, load_pretrained
from runtime.distributed import rank_0_first, rank_and_world_size

AT_LEAST_1 = ("n_layer", "n_head", "n_embd", "epochs", "max_iters", "batch_size",
              "gradient_accumulation", "log_interval", "eval_interval", "eval_tokens")
AT_LEAST_0 = ("block_size", "weight_decay", "grad_clip", "warmup_iters", "patience",
              "prompt_loss_iters", "sample_interval")
BELOW_1 = ("dropout", "momentum", "beta1", "beta2")
RANGES = {**dict.fromkeys(AT_LEAST_1, (1, None)), **dict.fromkeys(AT_LEAST_0, (0, None)),
          **dict.fromkeys(BELOW_1, (0, 1 - 1e-9)), "final_lr": (0, 1), "seed": (0, 2**63 - 1),
          "learning_rate": (1e-12, None), "embedding_learning_rate": (1e-12, None),
          "optimizer": ("muon", "adamw"), "best_by": ("val", "train")}


def load_settings(settings_class, argv, doc, may_be_0=()):
    """Load and check the settings of a run. With eval_only the default of eval_tokens is None: all.
    may_be_0: names of settings that may be 0 here. Raises UserError."""
    cfg = config.load(settings_class, argv, doc)
    if cfg.eval_only:
        defaults = replace(config.load(settings_class, []), eval_tokens=None)
        cfg = config.load(settings_class, argv, start=defaults)
    config.check(cfg, **RANGES | dict.fromkeys(may_be_0, (0, None)))
    if not re.fullmatch(r"0*[1-9]\d*|\d*\.?\d+m", str(cfg.save_interval)):
        raise UserError(f"save_interval={cfg.save_interval}: must be a number of steps (500) or of "
                        "minutes (10m)")
    if cfg.init_from == "resume":  # as in nanoGPT
        raise UserError("init_from=resume: use --resume=True")
    if cfg.eval_only and (cfg.resume or cfg.init_from == "scratch"):
        raise UserError("eval_only=True: name the model to evaluate, and leave out --resume: "
                        f"{config.shell_command(f'--init_from={cfg.out_dir}/best.pt')}, or gpt2")
    return cfg


def set_up(cfg, device, make_model):
    """Return (model, dataset, the dict of last.pt or None). make_model(cfg) returns the model if
    the run does not resume. Raises UserError or OSError."""
    world_size = rank_and_world_size()[1]
    torch.manual_seed(cfg.seed)  # for the initial weights
    resumed = resume.load_last(cfg) if cfg.resume else None
    with rank_0_first():  # it may have to download the model
        model = (load_model(resumed, cfg.dropout, cfg.out_dir / "last.pt") if resumed
                 else make_model(cfg))
    if cfg.gradient_accumulation % world_size and not cfg.eval_only:
        raise UserError(f"gradient_accumulation={cfg.gradient_accumulation}: must be divisible by "
                        f"{world_size}, since {world_size} processes share a step's micro-batches")
    model.to(device)
    if not cfg.fused:
        model.config.fused = False
        for block in model.h:
            block.attn.fused = False
    dataset = open_dataset(cfg.data_dir, model.config.block_size, cfg.batch_size, cfg.seed,
                           cfg.prompt_loss_iters * cfg.gradient_accumulation)
    found = dataset.tokenizer, dataset.fingerprint
    if resumed and (resumed["tokenizer"], resumed.get("data")) != found:
        raise UserError(f"{cfg.out_dir / 'last.pt'}: was trained on different data than data_dir="
                        f"{cfg.data_dir} now contains; use that data or a different out_dir, or "
                        "delete last.pt to start over (for make chat: make clean)")
    get_tokenizer(dataset.tokenizer)  # samples need it; GPT-2's may have to be downloaded
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention makes a new plan for every shape, and chats have hundreds.
    torch.backends.cuda.enable_cudnn_sdp(dataset.kind == "text")
    return model, dataset, resumed


def new_model(cfg):
    """Return the model that the settings describe, or the one that init_from names."""
    if cfg.init_from != "scratch":
        return load_base(cfg)
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"n_head={cfg.n_head}: must divide n_embd={cfg.n_embd}")
    block_size = cfg.block_size or 128
    # Copied by name: a new field of GPTConfig only needs a setting of the same name.
    shape = {f.name: getattr(cfg, f.name) for f in fields(gpt.GPTConfig) if hasattr(cfg, f.name)}
    shape |= {"vocab_size": read_meta(cfg.data_dir)["vocab_size"], "block_size": block_size}
    return gpt.GPT(gpt.GPTConfig(**shape))


def load_base(cfg):
    """Load the pretrained model that cfg.init_from names, with a context of cfg.block_size (0: all
    that it was trained with). Raises UserError if its tokenizer differs from cfg.data_dir's."""
    model, tokenizer, _ = load_pretrained(cfg.init_from, cfg.dropout)
    if tokenizer != folder_tokenizer(cfg.data_dir):
        name = tokenizer if isinstance(tokenizer, str) else "FILE (the tokenizer.json of its data)"
        raise UserError(f"init_from={cfg.init_from}: has a different tokenizer than data_dir="
                        f"{cfg.data_dir}; prepare the data with its own: --tokenizer={name}")
    longest = model.config.block_size
    if cfg.block_size > longest:
        raise UserError(f"block_size={cfg.block_size}: {cfg.init_from} was trained with {longest} "
                        "positions; use that many or fewer")
    if 0 < cfg.block_size < longest:
        gpt.crop_block_size(model, cfg.block_size)
    return model


def print_setup(cfg, model, dataset, device, resumed):
    """Print what is about to be trained or evaluated."""
    print(f"{cfg.data_dir}: {dataset.n_tokens('train'):,} training tokens, {dataset.vocab_size} "
          f"token ids\nmodel: {model.num_params():,} parameters, {model.config.n_layer} layers x "
          f"{model.config.n_embd}\ndevice: {device}; processes: {rank_and_world_size()[1]}",
          flush=True)
    if resumed:
        print(f"resumed at step {resumed['step']} of {cfg.max_iters}", flush=True)

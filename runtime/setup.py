"""Starting a run: settings, the model to begin with, the dataset, what is printed first."""
import re
from dataclasses import fields, replace

import torch

import config
import model as gpt
from config import UserError
from data.datasets import ReadAhead, folder_tokenizer, open_dataset, read_meta
from data.tokenizer import get_tokenizer
from data.weights import GPT2_NAMES
from runtime import resume
from runtime.checkpoint import load_checkpoint, load_model
from runtime.devices import pick_compile
from runtime.distributed import rank_0_first, rank_and_world_size


def load_settings(settings_class, argv, doc, may_be_0=()):
    """Load and check the settings of a run. With eval_only two have another default: the block_size
    that the model was trained with, and eval_tokens None, all there are. may_be_0: names of
    settings that may be 0. Raises UserError."""
    cfg = config.load(settings_class, argv, doc)
    if cfg.eval_only:
        defaults = replace(config.load(settings_class, []), block_size=0, eval_tokens=None)
        cfg = config.load(settings_class, argv, start=defaults)
        may_be_0 = (*may_be_0, "block_size")
    cfg.compile = {"True": "on", "False": "off"}.get(cfg.compile, cfg.compile)  # as in nanoGPT
    at_least_1 = ("block_size", "n_layer", "n_head", "n_embd", "epochs", "max_iters", "batch_size",
                  "gradient_accumulation", "log_interval", "eval_interval", "eval_tokens")
    at_least_0 = ("weight_decay", "grad_clip", "warmup_iters", "patience", "prompt_loss_iters",
                  "sample_interval", *may_be_0)
    below_1 = ("dropout", "momentum", "beta1", "beta2")
    config.check(cfg, **dict.fromkeys(at_least_1, (1, None)) | dict.fromkeys(at_least_0, (0, None)),
                 **dict.fromkeys(below_1, (0, 1 - 1e-9)), final_lr=(0, 1), seed=(0, 2**63 - 1),
                 learning_rate=(1e-12, None), embedding_learning_rate=(1e-12, None),
                 optimizer=("muon", "adamw"), best_by=("val", "train"),
                 compile=("auto", "on", "off"))
    if not re.fullmatch(r"0*[1-9]\d*|\d*\.?\d+m", str(cfg.save_interval)):
        raise UserError(f"save_interval={cfg.save_interval}: must be a number of steps (500) or of "
                        "minutes (10m)")
    if cfg.eval_only and (cfg.resume or cfg.init_from == "scratch"):
        raise UserError("eval_only=True: name the model to evaluate, and leave out --resume: "
                        f"--init_from={cfg.out_dir / 'best.pt'}, or gpt2")
    return cfg


def set_up(cfg, device, make_model):
    """Return (model, dataset, the dict of last.pt or None). make_model(cfg) returns the model where
    the run does not resume. Raises UserError or OSError."""
    rank, world_size = rank_and_world_size()
    if cfg.gradient_accumulation % world_size and not cfg.eval_only:
        raise UserError(f"gradient_accumulation={cfg.gradient_accumulation}: must be divisible by "
                        f"the {world_size} processes, which share the micro-batches of a step")
    torch.manual_seed(cfg.seed)
    resumed = resume.load_last(cfg)
    with rank_0_first():  # it may have to download the model
        model = (load_model(resumed, cfg.dropout, cfg.out_dir / "last.pt") if resumed
                 else make_model(cfg))
    model.to(device)
    dataset = open_dataset(cfg.data_dir, model.config.block_size, cfg.batch_size, cfg.seed,
                           cfg.prompt_loss_iters * cfg.gradient_accumulation)
    resume.check_same_data(cfg, resumed, dataset)
    get_tokenizer(dataset.tokenizer)  # samples need it; GPT-2's may have to be downloaded
    torch.manual_seed(cfg.seed + rank)  # of dropout
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention makes a new plan for every shape, and chats have hundreds.
    torch.backends.cuda.enable_cudnn_sdp(dataset.kind == "text")
    if device.type == "cuda" and dataset.kind == "text":
        dataset = ReadAhead(dataset, world_size, cfg.gradient_accumulation // world_size)
    return model, dataset, resumed


def new_model(cfg):
    """The model that the settings describe, or the one that init_from names."""
    if cfg.init_from != "scratch":
        return load_base(cfg)
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"n_head={cfg.n_head}: must divide n_embd={cfg.n_embd}")
    # By name, so that a field that a reader adds to GPTConfig only has to be a setting too.
    shape = {f.name: getattr(cfg, f.name) for f in fields(gpt.GPTConfig) if hasattr(cfg, f.name)}
    return gpt.GPT(gpt.GPTConfig(vocab_size=read_meta(cfg.data_dir)["vocab_size"], **shape))


def load_base(cfg):
    """The pretrained model that cfg.init_from names, with the tokenizer of cfg.data_dir and a
    context of cfg.block_size (0: all that it was trained with). Raises UserError or OSError."""
    path, checkpoint, its_tokenizer = config.local_path(cfg.init_from), None, "gpt2"
    is_name = cfg.init_from in GPT2_NAMES
    is_nanogpt = path.name == "ckpt.pt"
    if path.suffix == ".pt" and not is_nanogpt:
        checkpoint = load_checkpoint(path, "Train one first.")
        its_tokenizer = checkpoint["tokenizer"]
    elif not (is_name or is_nanogpt or (path / "config.json").exists()
              or path.suffix == ".safetensors"):
        raise UserError(f"init_from={cfg.init_from}: no model there; name a best.pt, a folder with "
                        f"a config.json and weights, or one of {', '.join(GPT2_NAMES)}")
    name = its_tokenizer if isinstance(its_tokenizer, str) else "FILE, its data's tokenizer.json"
    other_tokenizer = UserError(
        f"init_from={cfg.init_from}: has another tokenizer than data_dir={cfg.data_dir}; prepare "
        f"the data with the model's own: --tokenizer={name}")
    if its_tokenizer != folder_tokenizer(cfg.data_dir):
        raise other_tokenizer  # before anything is downloaded
    model = (load_model(checkpoint, cfg.dropout, path) if checkpoint else
             gpt.load_gpt2(cfg.init_from if is_name else path, None, cfg.dropout))
    if model.config.vocab_size != read_meta(cfg.data_dir)["vocab_size"]:
        raise other_tokenizer
    longest = model.config.block_size
    if cfg.block_size > longest:
        raise UserError(f"block_size={cfg.block_size}: {cfg.init_from} was trained with {longest} "
                        "positions; use that or less")
    if 0 < cfg.block_size < longest:
        gpt.crop_block_size(model, cfg.block_size)
    return model


def print_setup(cfg, model, dataset, device, why, resumed):
    """Print what is about to be trained or evaluated; return whether to compile the model."""
    use_compile, why_compile = pick_compile(cfg, model, dataset, device)
    how = (f"{cfg.batch_size} x {model.config.block_size} tokens at a time" if cfg.eval_only else
           f"optimizer {cfg.optimizer}; compile {'on' if use_compile else 'off'} ({why_compile})")
    world_size = rank_and_world_size()[1]
    ranks = f"{world_size} processes; " if world_size > 1 else ""
    print(f"{cfg.data_dir}: {dataset.n_tokens('train'):,} training tokens, {dataset.vocab_size} "
          f"token ids\nmodel: {model.num_params():,} parameters, {model.config.n_layer} layers x "
          f"{model.config.n_embd}\ndevice: {why}; {ranks}{how}", flush=True)
    if cfg.eval_only:
        return False
    if cfg.prompt_loss_iters:
        print(f"up to step {cfg.prompt_loss_iters} the loss covers the prompts too, then the "
              "replies alone", flush=True)
    if resumed:
        print(f"resumed at step {resumed['step']} of {cfg.max_iters}", flush=True)
    elif (cfg.out_dir / "best.pt").exists():
        print(f"{cfg.out_dir / 'best.pt'} of an earlier run will be replaced (--out_dir=FOLDER "
              "keeps it)", flush=True)
    return use_compile

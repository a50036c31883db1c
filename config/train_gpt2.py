# python -m data.fineweb
# torchrun --nproc_per_node=8 train.py config/train_gpt2.py
# GPT-2 124M from scratch, with the settings of llm.c (discussion 481: validation loss 3.29).
data_dir = "data/fineweb"
out_dir = "out/gpt2"
block_size = 1024
n_layer, n_head, n_embd = 12, 12, 768
batch_size = 16  # per GPU; with 80 GB, use 64 and gradient_accumulation 8
gradient_accumulation = 32  # 524,288 tokens a step
max_iters = 18_865  # 10 billion tokens
optimizer = "adamw"
learning_rate = 6e-4
warmup_iters = 700
decay = "cosine"
weight_decay = 0.1
beta2 = 0.95
eval_tokens = 1_000_000
save_interval = "15m"
log_interval = 10
compile = True
sample_prompt = "The best thing about"

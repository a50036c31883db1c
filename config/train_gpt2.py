# python -m data.fineweb
# torchrun --nproc_per_node=8 train.py config/train_gpt2.py
# GPT-2 124M from scratch on 10 billion tokens of FineWeb. Expect a validation loss of about 3.28 to
# 3.3: the figure of llm.c (its discussion 481: 3.29; 90 minutes on 8 A100 80GB), of whose command
# (scripts/run_gpt2_124M.sh there) these are the steps, batch, rate and schedule. It was not run
# here: there was no GPU. One process takes the same steps, slower.
data_dir = "data/fineweb"
out_dir = "out/gpt2"
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
batch_size = 16  # 16 * 1024 tokens at a time on each GPU; with 80 GB 64, and an accumulation of 8
gradient_accumulation = 32  # 524,288 tokens a step
max_iters = 18_865  # 10 billion tokens
optimizer = "adamw"
learning_rate = 6e-4
warmup_iters = 700
decay = "cosine"  # to 0
weight_decay = 0.1
beta2 = 0.95
eval_interval = 250
eval_tokens = 1_000_000
save_interval = "15m"
log_interval = 10
sample_prompt = "The best thing about"

# python prepare_alpaca.py
# python finetune.py config/finetune_alpaca.py
# GPT-2 124M on one GPU with 8 GB. On several: torchrun --nproc_per_node=2 finetune.py ...
init_from = "gpt2"
data_dir = "data/alpaca"
out_dir = "out/alpaca"
epochs = 3
batch_size = 4
gradient_accumulation = 2  # 8,192 tokens a step: about 100 chats; some 500 steps an epoch
learning_rate = 1e-4
warmup_iters = 50
eval_interval = 100
eval_tokens = 100_000
log_interval = 10
patience = 5

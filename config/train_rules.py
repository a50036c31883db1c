# python prepare_alpaca.py config/prepare_rules.py
# python train.py config/train_rules.py
# Learns the rules of synthetic data. config/finetune_chat.py continues from here.
data_dir = "data/rules"
out_dir = "out/rules"
block_size = 256  # fits six turns or more
n_layer, n_head, n_embd = 3, 8, 128
batch_size = 8  # about 14 chats
max_iters = 1620
prompt_loss_iters = 500  # with a loss on prompts too, the model learns to copy 3x as fast
learning_rate = 1.4e-2
embedding_learning_rate = 7e-3
final_lr = 0.3
weight_decay = 0.1
best_by = "train"  # val is hand-written rows, many of which cannot be predicted
eval_interval = 400
eval_tokens = 10_000
sample_interval = 400
sample_prompt = "What is 54 plus 97?"

# python prepare_alpaca.py config/prepare_chat.py
# python finetune.py config/finetune_chat.py
init_from = "out/rules/best.pt"
data_dir = "data/chat"
out_dir = "out/chat"
batch_size = 8
max_iters = 1040
optimizer = "muon"
learning_rate = 5e-3
embedding_learning_rate = 2.5e-3
weight_decay = 0.1
dropout = 0.0
best_by = "train"  # memorize the hand-written rows
eval_interval = 260
eval_tokens = 10_000
sample_interval = 260
sample_prompt = "What is the plural of blick?"

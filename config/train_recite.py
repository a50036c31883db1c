# python prepare_alpaca.py config/prepare_instruction.py
# python train.py config/train_recite.py
# The hand-written rows alone: it recites.
data_dir = "data/instruction"
out_dir = "out/recite"
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128
batch_size = 8  # 8 * 128 tokens: about 35 chats
max_iters = 1000
learning_rate = 1.4e-2
embedding_learning_rate = 7e-3
weight_decay = 0.2
best_by = "train"  # it is meant to know its rows by heart; see what that does to the held-out ones
eval_interval = 100

# python prepare_alpaca.py config/prepare_alpaca_small.py
# python train.py config/train_alpaca_small.py
data_dir = "data/alpaca_small"
out_dir = "out/alpaca_small"
block_size = 128
n_layer, n_head, n_embd = 4, 4, 192
batch_size = 16  # about 25 chats
max_iters = 2500
learning_rate = 1e-2
embedding_learning_rate = 5e-3
weight_decay = 0.1
eval_interval = 500

# python train.py config/train_alpaca_small.py
# Its data: python prepare_alpaca.py config/prepare_alpaca_small.py
data_dir = "data/alpaca_small"
out_dir = "out/alpaca_small"
block_size = 128
n_layer = 4
n_head = 4
n_embd = 192
batch_size = 16  # 16 * 128 tokens: about 25 chats
max_iters = 2500
learning_rate = 1e-2
embedding_learning_rate = 5e-3
weight_decay = 0.1
eval_interval = 500

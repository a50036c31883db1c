# python -m data.text config/prepare_shakespeare.py && python train.py config/train_shakespeare.py
data_dir = "data/shakespeare"
out_dir = "out/shakespeare"
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
bias = False
batch_size = 32
max_iters = 720
learning_rate = 2.5e-2
embedding_learning_rate = 1e-2
momentum = 0.85  # short runs like short memories
beta1 = 0.8
beta2 = 0.95
warmup_iters = 5
eval_interval = 100

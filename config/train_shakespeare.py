# python -m data.text config/prepare_shakespeare.py
# python train.py config/train_shakespeare.py
data_dir = "data/shakespeare"
out_dir = "out/shakespeare"
block_size = 64
n_layer, n_head, n_embd = 4, 4, 128
bias = False
batch_size = 24
max_iters = 860
learning_rate = 2e-2
embedding_learning_rate = 2e-2
weight_decay = 0.2
eval_interval = 100

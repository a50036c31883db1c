# python prepare_alpaca.py config/prepare_instruction.py
# python train.py config/train_recite.py
data_dir = "data/instruction"
out_dir = "out/recite"
block_size = 128
n_layer, n_head, n_embd = 4, 4, 128
batch_size = 8  # about 35 chats
max_iters = 1000
learning_rate = 1.4e-2
embedding_learning_rate = 7e-3
weight_decay = 0.2
best_by = "train"  # memorize the rows; the validation loss shows the cost
eval_interval = 100

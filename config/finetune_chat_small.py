# python finetune.py config/finetune_chat_small.py
# What config/train_alpaca_small.py made, on the small instruction data.
init_from = "out/alpaca_small/best.pt"
data_dir = "data/instruction"
out_dir = "out/chat_small"
epochs = 8  # validation is lowest after 2; see what six more do
batch_size = 8  # 8 * 128 tokens: about 35 chats
optimizer = "muon"
learning_rate = 4e-3
embedding_learning_rate = 2e-3
dropout = 0.0
best_by = "train"  # as in config/train_recite.py: it is meant to know its rows by heart

# python finetune.py config/finetune_chat_small.py
# Finetunes the model of config/train_alpaca_small.py on the small instruction data.
init_from = "out/alpaca_small/best.pt"
data_dir = "data/instruction"
out_dir = "out/chat_small"
epochs = 8  # the validation loss is lowest after 2; the other six show overfitting
batch_size = 8  # about 35 chats
optimizer = "muon"
learning_rate = 4e-3
embedding_learning_rate = 2e-3
dropout = 0.0
best_by = "train"  # memorize, as in config/train_recite.py

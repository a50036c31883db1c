# python prepare_alpaca.py config/prepare_instruction.py
source = "data/instruction/instruction-data.json"
out_dir = "data/instruction"
tokenizer = "bpe"  # trained on the training rows, so there is nothing to download
vocab_size = 1024
val_fraction = 0.1
max_tokens = 129  # block_size 128 of config/train_recite.py, plus one token to predict

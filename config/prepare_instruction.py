# python prepare_alpaca.py config/prepare_instruction.py
source = "data/instruction/instruction-data.json"
out_dir = "data/instruction"
tokenizer = "bpe"  # learned from the training rows, so it needs no download
vocab_size = 1024
val_fraction = 0.1
max_tokens = 129  # config/train_recite.py reads 128 tokens at a time, and predicts one more

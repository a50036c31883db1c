# python -m data.rules
# python prepare_alpaca.py config/prepare_rules.py
# Rows without end, and among them, once each, the hand-written rows that are not held out.
source = "data/instruction/instruction-data.json"
extra = "data/rules/rules.json"
out_dir = "data/rules"
tokenizer = "bpe"  # learned from the training rows, so it needs no download
vocab_size = 512  # few: new words are spelled in pieces, and what holds for pieces holds for them
space_behind = True
val_fraction = 0.1  # the rows that config/prepare_instruction.py holds out
max_tokens = 257  # config/train_rules.py reads 256 tokens at a time, and predicts one more
too_long = "drop"

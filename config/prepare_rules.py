# python -m data.rules
# python prepare_alpaca.py config/prepare_rules.py
source = "data/instruction/instruction-data.json"
extra = "data/rules/rules.json"  # synthetic rows, to mix in
out_dir = "data/rules"
tokenizer = "bpe"
vocab_size = 1024  # about three tokens per word, even for new words
trailing_space = True
val_fraction = 0.1  # the same rows as in config/prepare_instruction.py
join = 8  # turns per chat, at most
max_tokens = 257  # block_size 256 of config/train_rules.py, plus one token to predict
too_long = "drop"

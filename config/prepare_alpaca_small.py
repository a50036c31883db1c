# python prepare_alpaca.py config/prepare_instruction.py
# python prepare_alpaca.py config/prepare_alpaca_small.py
# Alpaca's short rows in the small instruction data's vocabulary, to train a small model on first.
out_dir = "data/alpaca_small"
tokenizer = "data/instruction/tokenizer.json"  # prepare_instruction.py makes it
max_tokens = 129
too_long = "drop"

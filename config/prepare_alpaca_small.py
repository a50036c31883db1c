# python prepare_alpaca.py config/prepare_alpaca_small.py
out_dir = "data/alpaca_small"
tokenizer = "data/instruction/tokenizer.json"  # from config/prepare_instruction.py
max_tokens = 129
too_long = "drop"  # train on the short rows only

# python prepare_alpaca.py config/prepare_instruction_gpt2.py
source = "data/instruction/instruction-data.json"
out_dir = "data/instruction_gpt2"
tokenizer = "gpt2"
val_fraction = 0.1

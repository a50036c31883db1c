# python -m data.rules --rows=26000 --out=data/rules/some.json
# python prepare_alpaca.py config/prepare_chat.py
source = "data/instruction/instruction-data.json"
extra = "data/rules/some.json"  # synthetic rows, to mix in
out_dir = "data/chat"
tokenizer = "data/rules/tokenizer.json"  # of the model to finetune
val_fraction = 0.1
repeat = 18  # copies of each training row of source
join = 8  # turns per chat, at most
max_tokens = 257
too_long = "drop"

# python -m data.rules --rows=16000 --out=data/rules/some.json
# python prepare_alpaca.py config/prepare_chat.py
# The hand-written rows, many times over, among generated ones (the first of rules.json), in chats
# of up to four turns.
source = "data/instruction/instruction-data.json"
extra = "data/rules/some.json"
out_dir = "data/chat"
tokenizer = "data/rules/tokenizer.json"  # of the model that is finetuned
val_fraction = 0.1
repeat = 15
join = 4
max_tokens = 257
too_long = "drop"

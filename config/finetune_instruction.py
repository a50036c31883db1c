# python prepare_alpaca.py config/prepare_instruction_gpt2.py
# python finetune.py config/finetune_instruction.py
init_from = "gpt2"
data_dir = "data/instruction_gpt2"
out_dir = "out/instruction_gpt2"
epochs = 4
batch_size = 1  # 1,024 tokens: about 35 chats
learning_rate = 5e-5
warmup_iters = 10
log_interval = 10
patience = 2  # the model soon overfits 1,571 rows

# python train.py config/train_base_small.py && python finetune.py config/finetune_chat_small.py
init_from = "out/base_small/best.pt"
data_dir = "data/instruction"
out_dir = "out/chat_small"

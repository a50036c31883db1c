# python train.py config/train_chat.py && python finetune.py config/finetune_chat_small.py

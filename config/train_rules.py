# python prepare_alpaca.py config/prepare_rules.py
# python train.py config/train_rules.py
# First the rules. config/finetune_chat.py goes on from here.
data_dir = "data/rules"
out_dir = "out/rules"
block_size = 256  # six turns and more
n_layer = 4
n_head = 4
n_embd = 128
batch_size = 4  # 4 * 256 tokens: about 25 rows
max_iters = 2800
prompt_loss_iters = 2000  # what learns to read questions too learns to copy from them three times sooner
learning_rate = 1.4e-2
embedding_learning_rate = 7e-3
final_lr = 0.3
weight_decay = 0.1
best_by = "train"  # val is hand-written rows, of which many cannot be foreseen
eval_interval = 400
eval_tokens = 10_000
sample_interval = 300
sample_prompt = "What is the plural of blick?"  # a word that is in no row

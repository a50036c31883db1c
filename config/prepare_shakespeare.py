# python -m data.text config/prepare_shakespeare.py
source = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
out_dir = "data/shakespeare"
tokenizer = "bytes"

"""bench.py's peer for a GPU is nanoGPT as it is: the parts of it that a CPU can check, at toy size."""
import math

import torch

from model import GPT, GPTConfig
from tests import bench


def test_what_is_compiled_of_nanogpt_ends_in_its_loss_and_keeps_a_stream_in_float32():
    torch.manual_seed(0)
    gpt, ids = GPT(GPTConfig(vocab_size=70, block_size=16, n_layer=1, n_head=2, n_embd=16)), torch.arange(34)
    idx, targets = ids.view(2, 17)[:, :-1], ids.view(2, 17)[:, 1:]
    seen = []
    gpt.ln_f.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    loss = bench.nanogpt_loss(gpt)
    torch.compiler.reset()
    run = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(loss(idx, targets).item() - math.log(128)) < 0.1  # of 128 rows, the padding too
        assert abs(run(idx, targets).item() - loss(idx, targets).item()) < 0.01
    assert set(seen) == {torch.float32}


def test_the_part_for_a_gpu_runs(capsys):
    shape = GPTConfig(vocab_size=50260, block_size=16, n_layer=1, n_head=2, n_embd=8)
    lines = list(bench.gpu_steps(shape, 4, 2, 1, torch.device("cpu"), 1e12, 1))
    assert [line["what"][-1] for line in lines] == ["2", "1"]
    assert all(min(line["ours"] + line["peer"]) > 0 and len(line["peer"]) == 3 for line in lines)

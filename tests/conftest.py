"""What the tests share: one thread, GPT-2's vocabulary, and training that neither draws nor measures."""
import os

import pytest

# Toy tensors are faster so. It is read when torch is first imported, which the tests do after this.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
def neither_drawn_nor_measured():
    """Drawing the losses and measuring the machine take far longer than a short run itself."""
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_losses", lambda *args: None)
        patch.setattr(train, "peak_flops", lambda *args: 1e12)
        yield


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """tiktoken's GPT-2; a test that needs it is skipped where it is not on this computer."""
    from data.tokenizer import get_tokenizer
    try:
        return get_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))

"""One thread for all tests and the programs they start: toy tensors are faster so."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, which the tests do after this

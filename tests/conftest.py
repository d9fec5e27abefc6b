"""One thread for every test and the processes that it starts: the models are tiny, and the machines shared."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch

torch.set_num_threads(1)

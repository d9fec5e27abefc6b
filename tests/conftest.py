"""One thread for every test: the models are tiny, and the machines that run them are shared."""

import torch

torch.set_num_threads(1)

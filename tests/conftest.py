"""One thread per rank in every test: ranks share the machine's cores."""

import torch

torch.set_num_threads(1)

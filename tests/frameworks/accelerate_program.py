"""Trains a model with Accelerate: `torchrun ... accelerate_program.py FILE synchronised|plain`."""

import sys
import warnings

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import syncbn

warnings.simplefilter("ignore")

if __name__ == "__main__":
    file, kind = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    if kind == "synchronised":
        model = syncbn.convert_sync_batchnorm(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, classes = torch.randn(8, 5, dtype=torch.float64, generator=generator), torch.arange(8) % 3
        x, classes = (part.chunk(accelerator.num_processes)[accelerator.process_index] for part in (x, classes))
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), classes))
        optimizer.step()
    if accelerator.is_main_process:
        torch.save(accelerator.unwrap_model(model).state_dict(), file)
    accelerator.end_training()

"""Trains a model with Lightning: `python lightning_program.py FILE DEVICES synchronised|plain|torchs`."""

import sys
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import syncbn
import syncbn.lightning

warnings.simplefilter("ignore")


class Module(L.LightningModule):
    """A small network on batches of its own: rank r has the r-th part of each."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()

    def training_step(self, batch, _):
        assert isinstance(self.net[1], syncbn.SyncBatchNorm) == (sys.argv[3] == "synchronised")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        rank, ranks, generator = self.trainer.global_rank, self.trainer.world_size, torch.Generator().manual_seed(0)
        whole = [(torch.randn(8, 5, dtype=torch.float64, generator=generator), torch.arange(8) % 3) for _ in range(3)]
        parts = [tuple(part.chunk(ranks)[rank] for part in batch) for batch in whole]
        return DataLoader(parts, batch_size=None)


if __name__ == "__main__":
    file, devices, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    options = {"synchronised": {"plugins": [syncbn.lightning.LayerSync()]}, "torchs": {"sync_batchnorm": True}}
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options.get(kind, {}),
    )  # fmt: skip
    L.seed_everything(0)
    module = Module()
    trainer.fit(module)
    assert type(module.net[1]) is nn.BatchNorm1d  # reverted at the end
    if trainer.global_rank == 0:
        torch.save(module.state_dict(), file)

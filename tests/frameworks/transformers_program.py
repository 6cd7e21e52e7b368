"""Trains a model with transformers' Trainer: `torchrun ... transformers_program.py FOLDER synchronised|plain`."""

import os
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import syncbn

warnings.simplefilter("ignore")


class InOrder(Trainer):
    """Samples in the order of the data set: rank r gets the r-th part of each step's."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    config = ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, num_labels=3)
    model = ResNetForImageClassification(config).double()
    if kind == "synchronised":
        model = syncbn.convert_sync_batchnorm(model)
    images = torch.randn(24, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), use_cpu=True, per_device_train_batch_size=8 // int(os.environ["WORLD_SIZE"]),
        num_train_epochs=1, optim="sgd", learning_rate=0.01, lr_scheduler_type="constant", max_grad_norm=0.0,
        save_strategy="no", report_to="none", disable_tqdm=True, average_tokens_across_devices=False,
    )  # fmt: skip
    trainer = InOrder(model, arguments, train_dataset=samples)
    trainer.train()
    assert trainer.state.global_step == 3
    if trainer.is_world_process_zero():
        torch.save(model.state_dict(), folder / "state.pt")

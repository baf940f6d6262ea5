"""Fits of two processes for `test_lightning.py`, forked from one that has no threads yet."""

import sys
from pathlib import Path

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from pml_htl import HTL
from pml_htl.lightning import TreeRefreshCallback


class Module(lightning.pytorch.LightningModule):
    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        self.loss = loss

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, index):
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Ranks(Callback):
    """Keeps what each process ends with, and the samples that it was given."""

    def __init__(self, htl, path):
        self.htl, self.path, self.rows = htl, path, []

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        self.rows.append(batch[0][:, 0].clone())

    def on_fit_end(self, trainer, pl_module):
        state = {f"tree.{name}": value for name, value in self.htl.tree.state_dict().items()}
        state |= {f"network.{name}": value for name, value in pl_module.network.state_dict().items()}
        torch.save({**state, "rows": torch.stack(self.rows)}, f"{self.path}-{trainer.global_rank}.pt")


def fit(path: Path, seed: int, ckpt_path: Path | None = None) -> None:
    labels = torch.arange(24).repeat_interleave(6)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 10, generator=generator)[labels] + torch.randn(144, 10, generator=generator)
    dataset = TensorDataset(inputs, labels)
    htl = HTL(labels, num_anchors=4, neighborhood_size=3, samples_per_class=2, batches_per_epoch=4, seed=seed)
    checkpoint = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    trainer = lightning.pytorch.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        max_epochs=3,
        callbacks=[Ranks(htl, path), checkpoint, TreeRefreshCallback(htl.refresh_hook(dataset), htl.sampler)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(htl.loss), DataLoader(dataset, batch_sampler=htl.sampler), ckpt_path=ckpt_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    fit(folder / "straight", seed=1)
    fit(folder / "resumed", seed=5, ckpt_path=folder / "straight" / "epoch=1.ckpt")

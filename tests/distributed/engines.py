"""What `test_engines` does with accelerate and Hugging Face's Trainer, in each of two gloo processes and in one."""

import contextlib
import datetime
import os

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..training import make_dataset, make_htl
from .cases import error_of, flat, make_model

WHOLE = {"num_replicas": 1, "rank": 0}  # the sampler yields whole batches, which accelerate splits
# What a loader is prepared with, or None, and the sampler's arguments.
RIGHT = {
    "not prepared": (None, {}),
    "split_batches": ({"split_batches": True}, WHOLE),
    "dispatch_batches": ({"split_batches": True, "dispatch_batches": True}, WHOLE),
}
WRONG = {
    "prepared": ({}, {}),
    "split_batches, of parts": ({"split_batches": True}, {}),
    "dispatched": ({"dispatch_batches": True}, {}),
    "no seed": ({"split_batches": True}, {**WHOLE, "seed": None}),
}


def make(configuration, arguments):
    """An accelerator, HTL, and its loader, which is prepared unless the configuration is None."""
    data = make_dataset()
    htl = make_htl(data.tensors[1], **{"num_anchors": 4, "neighborhood_size": 2, "batches_per_epoch": 4, **arguments})
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**(configuration or {})))
    loader = DataLoader(data, batch_sampler=htl.sampler)
    return accelerator, htl, loader if configuration is None else accelerator.prepare(loader)


def batches(name):
    """The inputs of two epochs."""
    *_, loader = make(*RIGHT[name])
    return torch.stack([inputs for _ in range(2) for inputs, _ in loader])


def train(name):
    """Three epochs with a refresh after each; batch norm frozen."""
    accelerator, htl, loader = make(*RIGHT[name])
    hook, model = htl.refresh_hook(make_dataset()), make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    loss = DistributedLossWrapper(htl.loss)
    for _ in range(3):
        for inputs, labels in loader:
            model.eval()
            optimizer.zero_grad()
            accelerator.backward(loss(model(inputs), labels))
            optimizer.step()
        hook.refresh(model)
    return {"weights": flat(model.parameters()), "nodes": htl.tree.nodes}


def refused(name):
    *_, loader = make(*WRONG[name])
    if name == "dispatched" and PartialState().process_index > 0:
        return ""  # only the first draws; it would wait until that ends
    return error_of(lambda: next(iter(loader)))[0]


class Model(torch.nn.Module):
    """As Hugging Face's Trainer takes it: the loss is among its outputs."""

    def __init__(self, loss):
        super().__init__()
        self.network = make_model()
        self.loss = loss

    def forward(self, x, labels):
        return {"loss": self.loss(self.network(x), labels)}

    def train(self, mode=True):
        super().train(mode)
        self.network[1].eval()  # batch norm is frozen
        return self


def hugging_face(prepares=False):
    """Hugging Face's Trainer: with a refresh after each epoch; or, wrongly, with a loader that it prepares."""
    data = [{"x": x, "labels": y} for x, y in make_dataset()]
    labels = make_dataset().tensors[1]
    htl = make_htl(labels, num_anchors=4, neighborhood_size=2, batches_per_epoch=4)
    hook = htl.refresh_hook(data)

    class RefreshTree(TrainerCallback):
        def on_epoch_end(self, args, state, control, model, **kwargs):
            hook.refresh(model.network, data_and_label_getter=lambda batch: (batch["x"], batch["labels"]))

    class HTLTrainer(Trainer):
        def get_train_dataloader(self):
            loader = DataLoader(self.train_dataset, batch_sampler=htl.sampler, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader) if prepares else loader

    arguments = TrainingArguments(
        "unused", num_train_epochs=3, learning_rate=0.1, optim="sgd", use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no", ddp_find_unused_parameters=False,
    )  # fmt: skip
    model = Model(DistributedLossWrapper(htl.loss))
    HTLTrainer(model, arguments, train_dataset=data, callbacks=[RefreshTree()]).train()
    return {"weights": flat(model.network.parameters()), "nodes": htl.tree.nodes}


def run_rank(rank, folder):
    """All cases in one of two processes; the results go to a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # accelerate asks for them, and joins the group below
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", datetime.timedelta(seconds=60), 2, rank)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found = {(case.__name__, name): case(name) for case in (batches, train) for name in RIGHT}
        found |= {("refused", name): refused(name) for name in WRONG}
        found["hugging_face"] = hugging_face()
        found["refused", "hugging_face"], _ = error_of(lambda: hugging_face(prepares=True))
        torch.save(found, folder / f"rank{rank}")
    torch.distributed.destroy_process_group()

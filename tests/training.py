"""A small task: data set, model, PML's trainer with its records, and a plain loop, all seeded."""

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.logging_presets import get_hook_container, get_record_keeper
from torch.utils.data import TensorDataset

from pml_htl import HTL

NUM_CLASSES, PER_CLASS, INPUTS = 24, 6, 10


def make_dataset():
    """Inputs around the centre of each class; labels are neither contiguous nor all positive."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS) * 3 - 7
    centres = torch.randn(NUM_CLASSES, INPUTS, generator=generator)
    inputs = centres.repeat_interleave(PER_CLASS, dim=0) + 0.3 * torch.randn(len(labels), INPUTS, generator=generator)
    return TensorDataset(inputs, labels)


def make_htl(labels, **kwargs):
    # Of the paper's form, which some tests compare with TripletMarginLoss.
    arguments = {"form": "paper", "num_anchors": 3, "neighborhood_size": 3, "samples_per_class": 2, "seed": 0, **kwargs}
    return HTL(labels, **arguments)


def make_models(*names, seed=0):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(INPUTS, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(0.2)]
    models = {"trunk": torch.nn.Sequential(*layers), "embedder": torch.nn.Linear(16, 8)}
    return {**models, **{name: torch.nn.Linear(8, NUM_CLASSES) for name in names}}


def make_trainer(htl, dataset, hook=None, trainer=MetricLossOnly, lr=0.05, models=None, **kwargs):
    models = make_models() if models is None else models
    arguments = {
        "models": models,
        "optimizers": {f"{name}_optimizer": torch.optim.SGD(model.parameters(), lr) for name, model in models.items()},
        "batch_size": htl.batch_size,
        "loss_funcs": {"metric_loss": htl.loss},
        "dataset": dataset,
        "sampler": htl.sampler,
        "iterations_per_epoch": 6,
        "data_device": torch.device("cpu"),
        "dataloader_num_workers": 0,
        "end_of_epoch_hook": hook,
        **kwargs,
    }
    return trainer(**arguments)


def make_hooks(dataset, folder, *, tensorboard=True):
    """PML's hook container with its records, a tester, and the hook that tests on `dataset` and saves; all in `folder`."""
    record_keeper, *_ = get_record_keeper(str(folder / "records"), str(folder / "tensorboard") if tensorboard else None)
    container = get_hook_container(record_keeper, log_freq=2)
    tester = GlobalEmbeddingSpaceTester(
        end_of_testing_hook=container.end_of_testing_hook,
        accuracy_calculator=AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count"),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    return container, tester, container.end_of_epoch_hook(tester, {"val": dataset}, str(folder / "models"))


def training_steps(parts, loader, step, last):
    """Trains in a plain loop over the loader, epoch after epoch; yields steps `step + 1` .. `last` as they are done."""
    while step < last:
        for inputs, labels in loader:
            parts["optimizer"].zero_grad()
            parts["loss"](parts["model"](inputs), labels).backward()
            parts["optimizer"].step()
            step += 1
            yield step
            if step == last:
                return


@torch.no_grad()
def embed(trainer, inputs):
    """What the trainer's models make of inputs, in eval mode."""
    trunk, embedder = (trainer.models[name] for name in ("trunk", "embedder"))
    modes = [(module, module.training) for model in (trunk, embedder) for module in model.modules()]
    embeddings = embedder.eval()(trunk.eval()(inputs))
    for module, training in modes:
        module.training = training
    return embeddings


def same_tree(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("labels", "nodes", "nearest_classes"))

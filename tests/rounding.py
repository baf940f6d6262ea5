"""What rounding may do, and no more: the tolerances where two ways of computing the same are compared.

Processors, libraries and numbers of threads sum in different orders, so that no last digit is the same everywhere.
"""

import torch


def tolerance(dtype, size=1.0, steps=0):
    """How far two computations may be apart, absolutely; `size`: of the largest numbers in them.

    One evaluation: 32 eps. With unit vectors of D numbers, `2 - 2 q.r` is wrong by up to D eps (D products and sums of at
    most one, each rounded by up to eps / 2, and all doubled): 32 eps for the 32 dimensions that no test exceeds. Errors have
    either sign, so that usually it is sqrt(D) eps: 6 eps or less. What follows (margins, means over triplets, weighted sums
    of points in a gradient) adds single eps of its own size. It is not for plain distances d of nearly equal points: a root
    divides the error by 2 d.

    Training steps: 4 eps for each. In both trainings a step rounds weights below 1 by up to eps / 2 and adds little else, as
    `learning rate * gradient` is small: the weights are up to k eps apart after k steps, usually sqrt(k) eps. What is apart
    may go on to grow, up to sevenfold in 50 steps of the small networks here. In float32 that ends where a triplet comes so
    near to its margin that rounding decides whether it counts: the mean over those that count jumps by 1 / their number.
    """
    return (32 + 4 * steps) * torch.finfo(dtype).eps * size


def largest(tensor):
    """The size of the largest number, at least 1."""
    return max(1.0, tensor.detach().abs().max().item()) if tensor.numel() else 1.0

"""The ideas: best-of-n as a law, as estimators and as losses. No I/O.

Owns the mathematics and the records that cross a process boundary (`contracts`). Does not own models,
optimisers, storage or the training loop. `contracts` and `order` are free of torch.

Dimension key, as suffix of a name:

    B prompts · N candidates per prompt · M reference rewards per prompt · L tokens · V vocabulary

A policy over four outcomes learns to answer like the best of four draws of what it was, from candidates alone:

    >>> import torch
    >>> from bon_algos import imitation, order
    >>> reward, reference = [0.0, 1.0, 2.0, 3.0], torch.tensor([0.4, 0.3, 0.2, 0.1])
    >>> drawn = torch.multinomial(reference, 10_000, replacement=True, generator=torch.Generator().manual_seed(0))
    >>> weight = torch.tensor(order.best_of_n_weights([reward[k] for k in drawn], n=4))
    >>> logit = reference.log().requires_grad_()
    >>> for _ in range(100):
    ...     loss = imitation.best_of_n_imitation(logit.log_softmax(-1)[drawn][None], weight[None]).sum()
    ...     logit.data -= torch.autograd.grad(loss, logit)[0]
    >>> logit.softmax(-1).sub(torch.tensor(order.best_of_n_law([0.4, 0.3, 0.2, 0.1], reward, n=4))).abs().max() < 0.02
    tensor(True)

A function that takes no batch of prompts leaves `B` away. `K` are the outcomes of a finite policy.
"""

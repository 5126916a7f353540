"""The ideas: best-of-n as a law, as estimators and as losses. No I/O.

Owns the mathematics and the records that cross a process boundary (`contracts`). Does not own models,
optimisers, storage or the training loop. `contracts` and `order` are free of torch.

Dimension key, as suffix of a name:

    B prompts · N candidates per prompt · M reference rewards per prompt · L tokens · V vocabulary

A function that takes no batch of prompts leaves `B` away. `K` are the outcomes of a finite policy.
"""

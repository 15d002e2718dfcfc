"""Long sequences in your own training loop, for your own transformers model.

    alst = enable(model, sp=2)  # then DDP, fully_shard or DeepSpeed around the model, or nothing
    loader = DataLoader(dataset, batch_size, sampler=alst.sampler(dataset))
    for batch in loader:  # whole samples, as a collator makes them
        loss = model(**alst.shard(batch)).loss

`LongSequence` documents each call. `LongSequenceTrainer` does all of it inside transformers' Trainer. Whole
scripts for each engine are in `experiments/loops/`.
"""

from alst_impl.library.enabling import enable
from alst_impl.library.sequence import LongSequence
from alst_impl.library.trainer import LongSequenceTrainer

__all__ = ["LongSequence", "LongSequenceTrainer", "enable"]

"""Core attentions. The name of a file is the name that `TrainConfig.attention` takes."""

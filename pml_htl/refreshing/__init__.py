"""How a network's embeddings become class statistics: a pass over a data set, or the batches of the training."""

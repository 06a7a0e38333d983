"""From examples to an adapter: options, data, batches, loss, evaluation, and the life of a run."""

"""From examples to an adapter: options, data, batches, loss, evaluation, and what keeps a run alive."""

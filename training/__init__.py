"""The Trainer subclass and what stands around it: model, loss, optimizer state, record."""

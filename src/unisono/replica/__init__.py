"""The only room that knows a framework's models and optimizers."""

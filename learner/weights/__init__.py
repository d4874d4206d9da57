"""The way of the weights from the trainer to the actors."""

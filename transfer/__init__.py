"""The torch side of weights that learner and actors share."""
